"""The clients of a run, each with what the training did for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


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


def client_results(
    summary: Mapping[str, Any], groups: Tensor | None, names: Sequence[str]
) -> list[ClientResult]:
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
    parts = (
        (True, each.get("ids", ()), clusters.get("labels"), first, each.get("test")),
        (False, each.get("unseen_ids", ()), clusters.get("unseen"), each.get("unseen_zero_leaf"), _served(each)),
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


def spaced(count: int, most: int) -> list[int]:
    """Places among `count`: all of them, or `most` that are evenly spaced, the first and the last with them."""
    if count <= most:
        return list(range(count))
    return [round(n * (count - 1) / (most - 1)) for n in range(most)]
