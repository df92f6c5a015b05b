"""A plugin of pytest that prints each failure as it happens, for runs that may be stopped before their end."""

from __future__ import annotations

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        print(f"\n==== {report.nodeid} failed in {report.when}\n{report.longreprtext}", flush=True)
