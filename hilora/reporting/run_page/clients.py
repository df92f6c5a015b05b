"""The clients of a run, each with what the training did for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from hilora.reporting.document import Block, Html, Paragraph
from hilora.reporting.run_page.charts import Span, axis, chart, column, spaced
from hilora.reporting.run_page.units import percent, points
from hilora.reporting.tables import MISSING, Row, Table


class ClientResult(NamedTuple):
    """What a run says of one client.

    Attributes:
        id: its number.
        seen: whether it took part in the training.
        group: the name of its true group, where known.
        cluster: the one that it was found in, or joined.
        before: test accuracy after the first tier; of an unseen client, before it trained anything of its own.
        after: test accuracy in the end.
        up: bytes that it sent; `down` that it was sent.
    """

    id: int
    seen: bool
    group: str | None
    cluster: int | None
    before: float | None
    after: float | None
    up: float | None
    down: float | None

    @property
    def gain(self) -> float | None:
        """The accuracy in the end less that before."""
        return None if self.before is None or self.after is None else self.after - self.before


def client_results(summary: Mapping[str, Any], groups: Tensor | None, names: Sequence[str]) -> list[ClientResult]:
    """The clients that were measured: the seen ones in their order, then the unseen ones.

    Args:
        summary: of the run; what it lacks is None.
        groups: int `[N]`, the true group of each client, where known.
        names: of these groups.
    """
    each, tiers = summary.get("per_client") or {}, summary.get("per_client_by_tier") or {}
    clusters = summary.get("clusters") or {}
    moved = (summary.get("communication") or {}).get("per_client") or {}
    first = next(iter(tiers.values()), None) if len(tiers) > 1 else None
    alone = each.get("unseen_zero_leaf") if "unseen_leaf" in each else None
    parts = (
        (True, each.get("ids", ()), clusters.get("labels"), first, each.get("test")),
        (False, each.get("unseen_ids", ()), clusters.get("unseen"), alone, _served(each)),
    )
    return [
        ClientResult(
            client,
            seen,
            None if groups is None or not names else names[int(groups[client])],
            None if not labels else labels[place],
            _known(before, place),
            _known(after, place),
            _known(moved.get("up"), client),
            _known(moved.get("down"), client),
        )
        for seen, ids, labels, before, after in parts
        for place, client in enumerate(ids)
    ]


def _served(each: Mapping[str, Any]) -> Sequence[float] | None:
    """What unseen clients reach in the end: with an adapter of their own, or without where they trained none."""
    found: Sequence[float] | None = each.get("unseen_leaf", each.get("unseen_zero_leaf"))
    return found


def _known(values: Sequence[float | None] | None, place: int) -> float | None:
    """A value, or None where it is missing or NaN."""
    value = None if not values else values[place]
    return None if value is None or value != value else value


def _ranked(clients: Sequence[ClientResult]) -> list[ClientResult]:
    """Seen clients and then unseen ones, each by what the chart shows."""
    gains = _gained(clients)

    def order(client: ClientResult) -> tuple[bool, bool, float]:
        value = client.gain if gains else client.after
        return not client.seen, value is None, 0.0 if value is None else -value

    return sorted(clients, key=order)


def clients_section(clients: Sequence[ClientResult], tiers: Sequence[str]) -> tuple[list[Block], list[dict[str, Any]]]:
    """A chart of what the clients gained and a table, of very many as many as a page has room for, and what each bar
    says.

    Args:
        clients: those that were measured.
        tiers: in the order in which they were trained.
    """
    if not clients:
        return [Paragraph("No client has been measured.")], []
    shown = spaced(_ranked(clients))
    gains = _gained(shown)
    what = (
        f"Gain of each client, {tiers[-1]} less {tiers[0]}, in points"
        if gains
        else "Test accuracy of each client, in %"
    )
    caption = f"Clients, by {'gain' if gains else 'accuracy'}"
    said_at = [
        {"x": (place + 0.5) / len(shown), "row": str(client.id), "text": _client_said(client)}
        for place, client in enumerate(shown)
    ]
    blocks: list[Block] = [
        Paragraph(_explained(len(shown), len(clients), tiers)),
        Html(_figure(shown, gains, what)),
        Html(f'<div class="tall sortable" id=clients tabindex=0 role=region aria-label="{caption}">'),
        _table(shown, caption),
        Html("</div>"),
    ]
    return blocks, said_at


def _gained(clients: Sequence[ClientResult]) -> bool:
    """Whether it is known what seen clients gained; else the chart shows where they are."""
    return any(client.seen and client.gain is not None for client in clients)


def _figure(shown: Sequence[ClientResult], gains: bool, what: str) -> str:
    values = [client.gain if gains else client.after for client in shown]
    heights = axis([0.0, *(100 * value for value in values if value is not None)])
    wide, gap = 1 / len(shown), 0.1 if len(shown) <= 100 else 0.0  # gaps of less than a pixel would flicker
    marks = "".join(
        column(_kind(client), wide * (n + gap), wide * (n + 1 - gap), 100 * value, heights, _client_said(client))
        for n, (client, value) in enumerate(zip(shown, values, strict=True))
        if value is not None
    )
    seen = sum(client.seen for client in shown)
    parts = [part for part in (("seen", 0, seen), ("unseen", seen, len(shown))) if part[1] < part[2]]
    said = "; ".join(f"{name}: {_range(values[start:end], gains)}" for name, start, end in parts)
    series = [(name, f"{name} clients") for name, *_ in parts]
    spans = [Span(name, wide * start, wide * end) for name, start, end in parts]
    return chart("clients", what, f"A bar for each client, the highest first. {said}", marks, heights, series, spans)


def _explained(shown: int, count: int, tiers: Sequence[str]) -> str:
    late = "of an unseen client, before it trained an adapter of its own"
    before = f"after {tiers[0]}; {late}" if len(tiers) > 1 else late
    less = f" {shown} of {count} clients are shown, evenly spaced." if shown < count else ""
    return f"Accuracies of each client on its own test images. Before: {before}. After: in the end.{less}"


def _kind(client: ClientResult) -> str:
    return "seen" if client.seen else "unseen"


def _table(shown: Sequence[ClientResult], caption: str) -> Table:
    """A row for each client; columns in which nothing is known are left out."""

    def megabytes(size: float | None) -> str:
        return MISSING if size is None else f"{size / 1e6:.3f}"

    columns = {
        "client": [str(client.id) for client in shown],
        "seen": ["yes" if client.seen else "no" for client in shown],
        "group": [client.group or MISSING for client in shown],
        "cluster": [MISSING if client.cluster is None else str(client.cluster) for client in shown],
        "before, %": [percent(client.before, "") for client in shown],
        "after, %": [percent(client.after, "") for client in shown],
        "gain": [points(client.gain) for client in shown],
        "sent, MB": [megabytes(client.up) for client in shown],
        "received, MB": [megabytes(client.down) for client in shown],
    }
    known = {name: cells for name, cells in columns.items() if set(cells) != {MISSING}}
    return Table(tuple(known), tuple(map(Row, zip(*known.values(), strict=True))), caption)


def _client_said(client: ClientResult) -> str:
    place = "" if client.cluster is None else f", cluster {client.cluster}"
    group = "" if client.group is None else f", {client.group}"
    gain = "" if client.gain is None else f" (before {percent(client.before)}, gain {points(client.gain)})"
    return f"client {client.id}, {_kind(client)}{group}{place}: {percent(client.after)}{gain}"


def _range(values: Sequence[float | None], gains: bool) -> str:
    known = [value for value in values if value is not None]
    say = points if gains else percent
    return f"{len(known)} clients, {say(min(known))} to {say(max(known))}" if known else "not measured"
