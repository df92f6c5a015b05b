"""Clients of each budget, as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hilora.reporting.run_page.units import amount, percent
from hilora.reporting.tables import MISSING, Row, Table

Group = Mapping[str, Any]


def budget_name(group: Group) -> str:
    """A budget in words: its ranks, its layers, or both."""
    given = [(group[kind], kind) for kind in ("ranks", "layers") if group[kind] is not None]
    return "/".join(f"{count} {kind[:-1] if count == 1 else kind}" for count, kind in given)


COLUMNS: Mapping[str, Callable[[Group], str]] = {
    "budget": budget_name,
    "clients": lambda group: str(len(group["clients"])),
    "accuracy": lambda group: percent(group["accuracy"]["mean"], ""),
    "unseen\nzero leaf": lambda group: percent(group.get("unseen", {}).get("zero_leaf"), ""),
    "unseen\nleaf": lambda group: percent(group.get("unseen", {}).get("leaf"), ""),
    "sent\na round": lambda group: amount(group["up"]),
    "received\na round": lambda group: amount(group["down"]),
    "GFLOPs\nan image": lambda group: MISSING if group["flops"] is None else f"{group['flops'] / 1e9:.3g}",
    "trained\nparameters": lambda group: f"{group['parameters']:,}" if "parameters" in group else MISSING,
}


def budget_table(
    runs: Sequence[tuple[tuple[str, ...], Mapping[str, Any]]], names: Sequence[str] = (), caption: str = ""
) -> Table | None:
    """A row for each budget of each run; None where no run has budgets.

    Args:
        runs: what stands first in the rows of each run, and what its `summary.json` says.
        names: of these first columns.
        caption: of the table.
    """
    rows = [
        Row((*first, *(cell(group) for cell in COLUMNS.values())))
        for first, run in runs
        for group in run.get("budgets") or ()
    ]
    return Table((*names, *COLUMNS), tuple(rows), caption) if rows else None
