"""What of a summary is kept."""

from __future__ import annotations

import json
import math

import torch

from hilora.experiments.results import KEPT, results, rounded


def test_numbers_are_rounded_and_what_is_not_finite_is_none() -> None:
    value = {"a": [1 / 3, math.nan, math.inf, None, True, 7], 2: torch.tensor([0.25]), "b": ("x", 1e-9)}
    found = rounded(value)
    assert found == {"a": [0.333333, None, None, None, True, 7], "2": [0.25], "b": ["x", 0.0]}
    json.dumps(found, allow_nan=False)


def test_of_clusters_their_number_and_agreement_are_kept_and_of_the_rest_the_figures() -> None:
    summary = dict.fromkeys(KEPT) | {
        "final": {"mean": 0.12345678},
        "clusters": {"k": 2, "ari": 1.0, "labels": [0, 1, 1], "unseen": [0]},
        "arguments": {"data_dir": "somewhere"},
    }
    found = results(summary)
    assert found["final"] == {"mean": 0.123457}
    assert found["clusters"] == {"k": 2, "ari": 1.0}
    assert "arguments" not in found
    assert results(summary | {"clusters": None})["clusters"] is None
    assert "budgets" not in found
    groups = [{"ranks": 8, "layers": None, "up": 1 / 3}]
    assert results(summary | {"budgets": groups})["budgets"] == [{"ranks": 8, "layers": None, "up": 0.333333}]
