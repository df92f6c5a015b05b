"""Runs to make pages of: summaries, rounds and clients, of any number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.reporting.run_page.page import run_page
from tests.reporting.test_comparison import make_summary

HOSTILE = "</script><script>alert(1)</script>\u2028\"'&<b>"
STAGES = ("root", "cluster", "leaf")


def make_run(seen: int = 8, late: int = 2, rounds: int = 6, k: int = 2, **changes: Any) -> dict[str, Any]:
    """What a finished run with three tiers says; client i gains i, in points, modulo 40."""
    after = [0.5 + 0.01 * (i % 40) for i in range(seen)]
    summary = make_summary(
        rounds=rounds,
        dtype="float32",
        seconds_by_phase={"train": 8.0, "evaluate": 4.0, "group": 0.5, "write": 0.25},
        per_client={
            "ids": list(range(seen)),
            "test": after,
            "val": after,
            "unseen_ids": list(range(seen, seen + late)),
            "unseen_zero_leaf": [0.25] * late,
            "unseen_leaf": [0.375] * late,
        },
        per_client_by_tier={"root": [0.5] * seen, "cluster": [0.5] * seen, "leaf": after},
        clusters={
            "k": k,
            "labels": [i % k for i in range(seen)],
            "unseen": [0] * late,
            "ari": 0.5,
        },
        communication={
            "up": 1e6,
            "down": 2e6,
            "per_client": {"up": [6e6] * (seen + late), "down": [12e6] * (seen + late)},
        },
        trained_parameters=12345,
    )
    return summary | changes


def make_rounds(count: int = 6) -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`, of three stages of equal length; a client sends 1 MB in a round and receives 2."""
    accuracy = {"mean": 0.5, "tail": 0.25, "std": 0.125}
    return [
        {
            "round": number,
            "stage": STAGES[3 * (number - 1) // count],
            "loss": 1.5,
            "test": {**accuracy, "mean": 0.5 + 0.4 * number / count},
            "val": accuracy,
            "up": 1e6 * number,
            "down": 2e6 * number,
        }
        for number in range(1, count + 1)
    ]


def make_page(
    summary: dict[str, Any] | None = None,
    records: list[dict[str, Any]] | None = None,
    names: tuple[str, ...] = ("fish", "trees"),
    groups: Tensor | None = None,
    **settings: Any,
) -> str:
    summary = make_run() if summary is None else summary
    count = len((summary.get("communication") or {"per_client": {"up": []}})["per_client"]["up"])
    groups = torch.arange(count) % len(names) if groups is None and names else groups
    return run_page(summary, make_rounds() if records is None else records, settings, groups, names)
