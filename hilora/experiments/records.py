"""What a line of the ledger must hold for a report to read it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from hilora.experiments.schema import DEFAULTS

Line = dict[str, Any]
DIVERGED = "diverged"  # in the results of a run that could not be trained: why
TEXTS = ("date", "revision", "torch", "device", "dtype")

Check = Callable[[Any], bool]


def is_record(value: Any) -> bool:
    """Whether a value that JSON gave has the shape of a line. Figures may be absent; what is there is of its type."""
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), str) for name in TEXTS)
        and isinstance(value.get("key"), dict)
        and _decides(value.get("decides"))
        and _results(value.get("results"))
    )


def _decides(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.get("schema", 1) in DEFAULTS
        and all(isinstance(value.get(name), dict) for name in (_settings(value), "partition", "model"))
        and isinstance(value.get("strategy"), str)
        and isinstance(value["partition"].get("scheme", ""), str)
        and isinstance(value[_settings(value)].get("options", {}), dict)
    )


def _settings(decides: dict[str, Any]) -> str:
    """Where a line keeps the settings of its training."""
    return "settings" if "schema" in decides else "run"


def _results(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get(DIVERGED, ""), str)
        and all(check(value[name]) for name, check in SHAPES.items() if value.get(name) is not None)
    )


def _figure(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and math.isfinite(value))


def _table(check: Check) -> Check:
    """A table whose values pass the check."""
    return lambda value: isinstance(value, dict) and all(check(one) for one in value.values())


def _terms(value: Any) -> bool:
    """Figures, and under the name of overlap a table of them."""
    figures = _table(_figure)
    return isinstance(value, dict) and figures({**value, "overlap": None}) and figures(value.get("overlap") or {})


def _clients(value: Any) -> bool:
    """Lists of figures; those of ids and of test accuracies are equally long."""
    lists = isinstance(value, dict) and all(isinstance(one, list) and all(map(_figure, one)) for one in value.values())
    return lists and len(value.get("ids", ())) == len(value.get("test", ()))


SHAPES: dict[str, Check] = {
    **dict.fromkeys(("final", "val", "unseen", "communication", "clusters"), _table(_figure)),
    **dict.fromkeys(("trained_parameters", "images"), _figure),
    "tiers": _table(_table(_figure)),
    "diagnostics": _table(_terms),
    "per_client": _clients,
}
