"""What of a finished run is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

DIGITS = 6
KEPT = (
    "final",
    "val",
    "tiers",
    "unseen",
    "per_client",
    "diagnostics",
    "communication",
    "trained_parameters",
    "images",
    "rounds",
    "seconds",
)


def results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a run that has come to its end, as its summary has them; of clusters, how many and how right, and
    of bytes the means over clients."""
    clusters, moved = summary["clusters"], summary["communication"]
    kept = {name: summary[name] for name in KEPT}
    kept |= {"budgets": summary["budgets"]} if "budgets" in summary else {}
    kept["communication"] = moved and {way: value for way, value in moved.items() if way != "per_client"}
    kept["clusters"] = None if clusters is None else {"k": clusters["k"], "ari": clusters["ari"]}
    figures: dict[str, Any] = rounded(kept)
    return figures


def rounded(value: Any) -> Any:
    """Plain values with six digits after the point; what is not finite becomes None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return round(value, DIGITS) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): rounded(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [rounded(inner) for inner in value]
    return value
