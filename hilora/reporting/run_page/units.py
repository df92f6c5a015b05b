"""How figures are written on the page of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hilora.reporting.tables import MISSING


def percent(value: float | None, unit: str = " %") -> str:
    return MISSING if value is None or value != value else f"{100 * value:.1f}{unit}"


def points(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:+.1f}".replace("-", "−")


def whole(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def amount(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
