"""`report.html` of a run: one page that needs nothing else, and is whole without its script."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from hilora.reporting.budgets import budget_table
from hilora.reporting.document import Block, Heading, Html, Paragraph, page
from hilora.reporting.run_page.charts import Cell, shaded
from hilora.reporting.run_page.clients import ClientResult, client_results, clients_section
from hilora.reporting.run_page.rounds import rounds_section
from hilora.reporting.run_page.units import amount, duration, percent, setting, whole
from hilora.reporting.summary import PHASES
from hilora.reporting.tables import MISSING, Row, Table

Mapped = Mapping[str, Any]
DOES = {
    "train": "training",
    "evaluate": "evaluation, and unseen clients",
    "group": "forming of groups",
    "write": "checkpoints and metrics",
}


def run_page(
    summary: Mapped,
    records: Sequence[Mapped],
    settings: Mapped,
    groups: Tensor | None = None,
    names: Sequence[str] = (),
) -> str:
    """The page, in HTML.

    Args:
        summary: what `summary.json` says; whatever is missing in it is left out.
        records: the lines of `metrics.jsonl`.
        settings: those that are not the defaults, as JSON has them.
        groups: int `[N]`, the true group of each client, where known.
        names: of these groups.
    """
    title = "{strategy} on {data}, {partition}, seed {seed}".format_map(summary)
    clients = client_results(summary, groups, names)
    rounds, at_rounds = rounds_section(records)
    each, at_clients = clients_section(clients, list(summary.get("per_client_by_tier") or {}))
    blocks: list[Block] = [Heading(1, title)]
    if summary.get("interrupted"):
        blocks.append(Paragraph("This run was interrupted: what follows is what it had reached."))
    blocks += [Html(_tiles(summary)), *_setup(summary, settings, clients), *_final(summary)]
    blocks += [*_budgets(summary), Heading(2, "Accuracy over the rounds"), *rounds]
    blocks += [Heading(2, "Clients"), *each]
    blocks += [Heading(2, "Clusters"), *_clusters(summary, clients)]
    blocks += [Heading(2, "Traffic"), *_traffic(summary, records, clients), Heading(2, "Time"), *_time(summary)]
    return page(title, blocks, {"rounds": at_rounds, "clients": at_clients})


def _tiles(summary: Mapped) -> str:
    """The first things that one wants to know."""
    final, clusters = summary["final"], summary.get("clusters")
    tiles = {"accuracy, mean of clients": percent(final["mean"]), "worst tenth of clients": percent(final["tail"])}
    if summary["unseen"]["leaf"] is not None:
        tiles["unseen clients"] = percent(summary["unseen"]["leaf"])
    if clusters:
        tiles["clusters"] = str(clusters["k"])
    tiles["rounds"] = str(summary.get("rounds", MISSING))
    tiles["time"] = duration(summary["seconds"])
    return _described("tiles", tiles)


def _setup(summary: Mapped, settings: Mapped, clients: Sequence[ClientResult]) -> list[Block]:
    seen = sum(client.seen for client in clients)
    said = {name: summary.get(name) for name in ("strategy", "data", "backbone", "dtype", "partition", "seed")}
    said["clients"] = f"{seen}, and {len(clients) - seen} unseen" if clients else None
    most = "parameters that a client trains" + (", at most" if summary.get("budgets") else "")
    said[most] = whole(summary.get("trained_parameters"))
    facts = {name: str(value) for name, value in said.items() if value is not None}
    changed = {name.replace("_", " "): setting(value) for name, value in settings.items() if name != "seed"}
    found: list[Block] = [Heading(2, "What was run"), Html(_described("facts", facts))]
    if not changed:
        return [*found, Paragraph("All settings are the defaults.")]
    return [*found, Paragraph("Settings that are not the defaults:"), Html(_described("facts", changed))]


def _described(kind: str, facts: Mapping[str, str]) -> str:
    """Names, each with what it is."""
    pairs = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl class={kind}>{''.join(pairs)}</dl>"


def _final(summary: Mapped) -> list[Block]:
    rows = [
        Row((f"after {tier}", *(percent(accuracy[name], "") for name in ("mean", "tail", "std"))))
        for tier, accuracy in summary["tiers"].items()
    ]
    if "val" in summary:
        rows.append(Row(("validation", *(percent(summary["val"][name], "") for name in ("mean", "tail", "std")))))
    unseen = {"unseen, before training": "zero_leaf", "unseen, own adapter": "leaf"}
    rows += [
        Row((name, percent(summary["unseen"][key], ""), MISSING, MISSING))
        for name, key in unseen.items()
        if summary["unseen"][key] is not None
    ]
    caption = "Test accuracy in %, over clients: mean, mean of the worst tenth, standard deviation"
    return [Heading(2, "Final figures"), Table(("", "mean", "tail", "std"), tuple(rows), caption)]


def _budgets(summary: Mapped) -> list[Block]:
    caption = "Clients of each budget: test accuracy in %, bytes a client and round, FLOPs by image of the rounds"
    table = budget_table([((), summary)], caption=caption)
    return [] if table is None else [Heading(2, "Budgets"), table]


def _clusters(summary: Mapped, clients: Sequence[ClientResult]) -> list[Block]:
    found = summary.get("clusters")
    if not found:
        return [Paragraph("No clusters were formed.")]
    counts = Counter((client.group or "clients", client.cluster) for client in clients if client.seen)
    names, numbers = sorted({name for name, _ in counts}), range(found["k"])
    most = max(counts.values(), default=1)
    rows = [
        (name, [Cell(str(count), count / most) if count else Cell("") for count in (counts[name, k] for k in numbers)])
        for name in names
    ]
    said = f"{found['k']} cluster{'' if found['k'] == 1 else 's'} of seen clients."
    if found["ari"] is not None:
        said += f" Agreement with the true groups (adjusted Rand index, 1 if they are the same): {found['ari']:.2f}."
    header = ("true group", *map(str, numbers))
    members = (", ".join(str(client.id) for client in clients if client.cluster == k) for k in numbers)
    listed = Table(
        ("cluster", "clients"), tuple(Row((str(k), ids)) for k, ids in enumerate(members)), "Clients by cluster"
    )
    return [
        Paragraph(said),
        Html(shaded("heat", "Seen clients of each true group (rows) in each cluster (columns)", header, rows)),
        Html(f"<details><summary>Who is in which, unseen clients too</summary>{listed.html()}</details>"),
    ]


def _traffic(summary: Mapped, records: Sequence[Mapped], clients: Sequence[ClientResult]) -> list[Block]:
    moved = summary.get("communication")
    if not moved:
        return [Paragraph("It was not measured.")]
    rows = _by_stage(records)
    rounds = summary.get("rounds", 0)
    rows.append(("the whole training", (moved["up"] * rounds, moved["down"] * rounds)))
    unseen = [(client.up, client.down) for client in clients if not client.seen]
    if unseen:
        up, down = (float(np.mean([way or 0.0 for way in ways])) for ways in zip(*unseen, strict=True))
        rows.append(("an unseen client", (up, down)))
    most = max(size for _, sizes in rows for size in sizes) or 1
    cells = [(name, [Cell(amount(size), size / most) for size in sizes]) for name, sizes in rows]
    caption = "What a client sends and receives, on the mean, by stage"
    return [Html(shaded("bar", caption, ("stage", "sent", "received"), cells))]


def _by_stage(records: Sequence[Mapped]) -> list[tuple[str, tuple[float, float]]]:
    """Bytes sent and received in each stage, which the rounds tell up to themselves."""
    found, before = [], (0.0, 0.0)
    for stage, part in groupby(records, key=lambda record: str(record["stage"])):
        last = list(part)[-1]
        if "up" in last and "down" in last:
            found.append((stage, (last["up"] - before[0], last["down"] - before[1])))
            before = (last["up"], last["down"])
    return found


def _time(summary: Mapped) -> list[Block]:
    phases, speed = summary.get("seconds_by_phase"), summary.get("images_per_second")
    if not phases:
        return [Paragraph(f"{duration(summary['seconds'])} in all.")]
    most = max(phases.values()) or 1
    rows = [(DOES[name], [Cell(duration(phases[name]), phases[name] / most)]) for name in PHASES]
    said = "" if speed is None else f"Training took in {whole(round(speed))} images a second."
    return [Html(shaded("bar", "Where the time went", ("phase", "time"), rows)), *([Paragraph(said)] if said else [])]
