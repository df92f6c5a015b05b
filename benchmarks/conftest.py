"""Prints what the benchmarks found: ratios, since seconds of one machine say little to another."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    found = [benchmark for benchmark in getattr(session, "benchmarks", []) if benchmark.extra_info]
    if found:
        terminalreporter.section("medians, side by side in one run")
    for benchmark in found:
        terminalreporter.write_line(benchmark.name)
        for name, value in benchmark.extra_info.items():
            terminalreporter.write_line(f"    {name:44}{value}")
