"""The tables of a report, as text in cells."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hilora.experiments.cells import Cell
from hilora.experiments.experiment import Experiment
from hilora.reporting.budgets import budget_name
from hilora.reporting.statistics import Spread, spread
from hilora.reporting.tables import MISSING, Row, Table

INCOMPLETE = "†"


def accuracy_table(cells: Sequence[Cell], compare: Cell) -> Table:
    """Personalised accuracy and what else is measured on clients, in %; columns that nothing fills are left out."""
    columns: dict[str, Callable[[Cell], str]] = {
        "method": _label,
        "runs": _runs,
        "accuracy": lambda cell: _percent(cell.over_seeds("final", "mean")),
        f"minus {compare.method.label} [95 %]": lambda cell: MISSING if cell is compare else _difference(cell, compare),
        "by seed": lambda cell: MISSING if cell is compare else _differences(cell, compare),
        "tail": lambda cell: _percent(cell.over_seeds("final", "tail")),
        "by budget": _by_budget,
        "std over clients": lambda cell: _percent(cell.over_seeds("final", "std")),
        "unseen, zero leaf": lambda cell: _percent(cell.over_seeds("unseen", "zero_leaf")),
        "unseen, own epochs": lambda cell: _percent(cell.over_seeds("unseen", "leaf")),
        "K": lambda cell: _each(cell, "{}", "clusters", "k"),
        "ARI": lambda cell: _each(cell, "{:.2f}", "clusters", "ari"),
        "published": _paper,
    }
    return _table(cells, columns)


def cost_table(cells: Sequence[Cell]) -> Table:
    """What a method sends, trains and looks at."""
    columns: dict[str, Callable[[Cell], str]] = {
        "method": _label,
        "up a round": lambda cell: _size(cell.over_seeds("communication", "up")),
        "down a round": lambda cell: _size(cell.over_seeds("communication", "down")),
        "up a round, by budget": lambda cell: _of_budgets(cell, lambda group: group["up"], _size),
        "down a round, by budget": lambda cell: _of_budgets(cell, lambda group: group["down"], _size),
        "GFLOPs an image, by budget": lambda cell: _of_budgets(
            cell, lambda group: group["flops"], lambda flops: f"{flops.mean / 1e9:.3g}"
        ),
        "trained parameters": lambda cell: _count(cell.over_seeds("trained_parameters")),
        "trained parameters, by budget": lambda cell: _of_budgets(cell, lambda group: group.get("parameters"), _count),
        "images trained on": lambda cell: _count(cell.over_seeds("images")),
    }
    return _table([cell for cell in cells if cell.trained], columns)


def tier_table(cells: Sequence[Cell]) -> Table:
    """What the theorem bounds, tier by tier, for methods of several tiers."""
    header = ("method", "tier", "accuracy ± over clients", "training loss", "overlap with", "label distance")
    rows = []
    for cell in cells:
        tiers = list(dict.fromkeys(tier for found in cell.by_seed("tiers").values() for tier in found))
        before = None
        for tier in tiers if len(tiers) > 1 else ():
            loss = cell.over_seeds("diagnostics", tier, "train_loss")
            rose = loss is not None and before is not None and loss.mean > before.mean
            overlaps = list(cell.by_seed("diagnostics", tier, "overlap").values())
            distance = cell.over_seeds("diagnostics", tier, "label_distance")
            mean, std = (cell.over_seeds("tiers", tier, name) for name in ("mean", "std"))
            rows.append(
                (
                    cell.method.label,
                    tier,
                    f"{100 * mean.mean:.1f} ± {100 * std.mean:.1f}" if mean and std else MISSING,
                    MISSING if loss is None else f"{loss.mean:.3f}{' ▲ rose' if rose else ''}",
                    _overlap(overlaps),
                    MISSING if distance is None else f"{distance.mean:.3f}",
                )
            )
            before = loss or before
    return _filled(header, [Row(row) for row in rows])


def tuning_table(cells: Sequence[Cell]) -> Table:
    """Every grid point that was tried, and how it fared on validation images."""
    rows = []
    for cell in cells:
        for place, point in enumerate(cell.method.grid if cell.choice else ()):
            assert cell.choice is not None
            score = cell.choice.scores[place]
            said = "diverged" if place in cell.choice.diverged else "missing" if score is None else f"{100 * score:.2f}"
            end = len(cell.choice.scores) > 1 and place in (0, len(cell.choice.scores) - 1)
            chosen = "" if place != cell.choice.place else "chosen, at the end of the grid" if end else "chosen"
            rows.append(Row((cell.method.label, str(place + 1), overrides(point) or "as it stands", said, chosen)))
    return Table(("method", "point", "overrides", "validation accuracy", ""), tuple(rows))


def method_table(experiment: Experiment) -> Table:
    """How each row is trained."""
    rows = [
        Row((method.label, method.strategy, overrides(method.run) or "as all", ", ".join(method.settings)))
        for method in experiment.methods.values()
    ]
    return Table(("row", "strategy", "its own settings", "run in"), tuple(rows))


def overrides(given: Mapping[str, Any]) -> str:
    """Settings as the file gives them, in one line."""
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in given.items())


def _table(cells: Sequence[Cell], columns: Mapping[str, Callable[[Cell], str]]) -> Table:
    """A row for each method, reference rows marked as such."""
    rows = [Row(tuple(cell(one) for cell in columns.values()), one.method.reference) for one in cells]
    return _filled(tuple(columns), rows)


def _filled(header: Sequence[str], rows: Sequence[Row]) -> Table:
    """Without the columns that no row fills."""
    kept = [place for place in range(len(header)) if any(row.cells[place] != MISSING for row in rows)]
    return Table(
        tuple(header[place] for place in kept),
        tuple(Row(tuple(row.cells[place] for place in kept), row.reference) for row in rows),
    )


def _label(cell: Cell) -> str:
    return cell.method.label + ("" if cell.complete else INCOMPLETE)


def _runs(cell: Cell) -> str:
    if not cell.applies:
        return "does not apply"
    if cell.hopeless:
        return "no final runs: every grid point diverged"
    said = f"{len(cell.finals)}/{len(cell.setting.seeds)}"
    if cell.diverged:
        said += f", diverged: seed{'s' if len(cell.diverged) > 1 else ''} {', '.join(map(str, cell.diverged))}"
    if cell.choice is not None and not cell.choice.done:
        said += f" (tuning {len(cell.tuned)}/{len(cell.method.grid)})"
    return said


def _percent(value: Spread | None) -> str:
    if value is None:
        return MISSING
    return f"{100 * value.mean:.1f}" + ("" if value.std is None else f" ± {100 * value.std:.1f}")


def _difference(cell: Cell, compare: Cell) -> str:
    """The paired difference and its interval; where clients are not recorded, that of the seeds' means alone. Marked
    where it lacks seeds because the row compared with is incomplete."""
    by_client, found = cell.less(compare)
    by_seed = _by_seed(cell, compare)
    seeds = len(by_seed if found is None else by_client)
    known = found or spread(list(by_seed.values()))
    if known is None:
        return MISSING
    text = _points(known.mean)
    if found is not None and found.low is not None and found.high is not None:
        text += f" [{_points(found.low)}, {_points(found.high)}]"
    return text + (INCOMPLETE if seeds < len(cell.setting.seeds) and not compare.complete else "")


def _differences(cell: Cell, compare: Cell) -> str:
    return _named(cell, {seed: _points(value) for seed, value in _by_seed(cell, compare).items()})


def _named(cell: Cell, texts: Mapping[int, str]) -> str:
    """Texts with the seed of each, unless the setting has one seed alone."""
    if len(cell.setting.seeds) == 1:
        return next(iter(texts.values()), MISSING)
    return ", ".join(f"{seed}: {text}" for seed, text in texts.items()) or MISSING


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


def _by_seed(cell: Cell, compare: Cell) -> dict[int, float]:
    ours, theirs = (one.by_seed("final", "mean") for one in (cell, compare))
    return {seed: value - theirs[seed] for seed, value in ours.items() if seed in theirs}


def _each(cell: Cell, form: str, *keys: str) -> str:
    """The figure of each seed, or the one that all seeds of the setting have."""
    texts = {seed: form.format(value) for seed, value in cell.by_seed(*keys).items()}
    agree = len(texts) == len(cell.setting.seeds) and len(set(texts.values())) == 1
    return next(iter(texts.values())) if agree else _named(cell, texts)


def _by_budget(cell: Cell) -> str:
    """Accuracy of the clients of each budget."""
    return _of_budgets(cell, lambda group: group["accuracy"]["mean"], lambda found: f"{100 * found.mean:.1f}")


def _of_budgets(cell: Cell, figure: Callable[[Any], float | None], said: Callable[[Spread], str]) -> str:
    """A figure of each budget, a mean over seeds, the budgets in the order of the setting."""
    texts = []
    for groups in zip(*cell.by_seed("budgets").values(), strict=True):
        value = spread([figure(group) for group in groups])
        texts.append(f"{budget_name(groups[0])}: {MISSING if value is None else said(value)}")
    return ", ".join(texts) or MISSING


def _paper(cell: Cell) -> str:
    found = cell.method.paper.get(cell.setting.name)
    return MISSING if found is None else f"{found:.1f}"


def _overlap(found: Sequence[Mapping[str, float | None]]) -> str:
    parts = []
    for other in dict.fromkeys(name for overlap in found for name in overlap):
        value = spread([overlap.get(other) for overlap in found])
        parts += [] if value is None else [f"{other} {value.mean:.3f}"]
    return ", ".join(parts) or MISSING


def _size(value: Spread | None) -> str:
    if value is None:
        return MISSING
    for unit, scale in (("MB", 1e6), ("kB", 1e3)):
        if value.mean >= scale:
            return f"{value.mean / scale:.3g} {unit}"
    return f"{value.mean:.0f} B"


def _count(value: Spread | None) -> str:
    return MISSING if value is None else f"{value.mean:,.0f}"
