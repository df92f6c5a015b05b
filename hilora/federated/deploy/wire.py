"""Downloads and uploads of one client as messages, and back: what they weigh is what travels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable, Stack
from hilora.federated.deploy.messages import Done, Errand, MessageError, Order, Tensors
from hilora.federated.engine.post import digest, digests
from hilora.federated.protocol import Download, Head, Rows, Upload


class Layout(NamedTuple):
    """What a row of each tier and a head look like in a run, `[1, ...]` each: nothing of another shape or dtype is
    read."""

    tiers: Mapping[str, AdapterTable]
    head: Head

    def of(self, name: str) -> Stack:
        """The layout of a part of a download, by its name.

        Raises:
            MessageError: there is no such part.
        """
        tier, _, rest = name.partition(".")
        factor = rest.partition(".")[0]
        if tier == "head":
            return self.head
        if tier not in self.tiers or factor not in ("A", "B"):
            raise MessageError(f"there is no part {name!r:.60}: expected head, or A or B of {', '.join(self.tiers)}")
        return self.tiers[tier].only(factor)


def written(row: Stack) -> Tensors:
    """The tensors of a stack of one row as they travel: an adapter at the rank and with the projections that it has.

    Raises:
        MessageError: an adapter has a scale of its own.
    """
    if not isinstance(row, AdapterTable):
        return {name: value[0].contiguous() for name, value in row.tensors().items()}
    if row.scale is not None:
        raise MessageError("adapters with scales of their own do not travel: put them into B, by with_scale_in_B()")
    row = row.resized(int(row.rank))
    found = {name: value[0] for name, value in row.tensors().items() if name != "rank"}
    kept = {name: _mark(found, name) for name in found if not _is_mark(name)}
    return found | {
        name: (found[name] if mark is None else found[name][mark]).contiguous() for name, mark in kept.items()
    }


def read(tensors: Tensors, layout: Stack, what: str) -> Any:
    """The stack of one row that `written` gave.

    Raises:
        MessageError: a tensor lacks, is unknown, is not finite, or has another dtype or shape than the layout's.
    """
    named = {name: value[0] for name, value in layout.tensors().items() if name != "rank"}
    expected = {name: value for name, value in named.items() if not _is_mark(name)}
    marks = {name: value for name, value in tensors.items() if _is_mark(name)}
    if isinstance(layout, AdapterTable) and (marks or layout.has):
        shapes = layout.A or layout.B
        expected |= {f"{index}.has": torch.ones(one.shape[1], dtype=torch.bool) for index, one in enumerate(shapes)}
    if set(tensors) != set(expected):
        raise MessageError(f"{what} has {_names(tensors)}, expected {_names(expected)}")
    rank = _rank(tensors, layout)
    for name, value in sorted(expected.items(), key=lambda item: not _is_mark(item[0])):
        found, shape = tensors[name], list(value.shape)
        if isinstance(layout, AdapterTable) and not _is_mark(name):
            shape[_rank_place(name)] = rank
            shape[0] = shape[0] if (mark := _mark(tensors, name)) is None else int(mark.sum())
        if found.dtype != value.dtype or list(found.shape) != shape:
            raise MessageError(f"{what}: {name} is {found.dtype} {list(found.shape)}, expected {value.dtype} {shape}")
        if not found.isfinite().all():
            raise MessageError(f"{what}: {name} is not finite")
    rows = {name: value[None] for name, value in tensors.items()}
    if not isinstance(layout, AdapterTable):
        return layout.like(rows)
    for name, value in tensors.items():
        if not _is_mark(name) and (mark := _mark(tensors, name)) is not None:
            whole = value.new_zeros(len(mark), *value.shape[1:])
            whole[mark] = value
            rows[name] = whole[None]
    return AdapterTable.of({**rows, "rank": torch.tensor([rank])}).resized(layout.r)


def _is_mark(name: str) -> bool:
    """Whether a tensor of an adapter says which projections it has."""
    return name.endswith(".has")


def _mark(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    """Which projections a factor is of, bool `[P]`; None: all."""
    return tensors.get(f"{name.partition('.')[0]}.has")


def _rank_place(name: str) -> int:
    """Which dimension of a factor `[P, r, in]` or `[P, out, r]` is the rank."""
    return 1 if name.endswith("lora_A") else 2


def _rank(tensors: Tensors, layout: Stack) -> int:
    """The rank that adapters were written at: at most the layout's."""
    if not isinstance(layout, AdapterTable):
        return 0
    name, first = next((name, value) for name, value in tensors.items() if not _is_mark(name))
    return min(first.shape[_rank_place(name)], layout.r) if first.dim() == 3 else layout.r


def _names(tensors: Mapping[str, Any]) -> str:
    return f"{', '.join(sorted(tensors)):.200}" or "nothing"


def order(download: Download, errand: Errand, held: Mapping[str, int]) -> Order:
    """The message with what the server has for one client, without the parts that it holds.

    Args:
        download: of one client.
        errand: what the client is to do.
        held: digests of the parts that it holds.
    """
    found: dict[str, list[int]] = {}
    parts = {}
    for part in download.parts():
        contents = int(digests(part))
        found.setdefault(part.name.rpartition(".")[0], []).append(contents)
        if contents and held.get(part.name) != contents:
            parts[part.name] = written(part.table.rows(part.slot))
    tiers: dict[str, dict[Any, list[int]]] = {tier: {} for tier in download.tiers}
    for name, contents_of in found.items():
        tier, _, factor = name.partition(".")
        if factor:
            tiers[tier][factor] = contents_of
    several = [tier for tier, rows in download.tiers.items() if rows.slot.dim() == 2]
    if download.head is not None and download.head.slot.dim() == 2:
        several.append("head")
    return Order(
        errand=errand,
        tiers=tiers,
        head=found.get("head"),
        choices=several,
        parts=parts,
        blocks=None if download.blocks is None else download.blocks[0],
    )


def received(message: Order, layout: Layout, held: Mapping[str, Stack]) -> tuple[dict[str, Stack], list[str]]:
    """What a client holds after an order has arrived, of what the order is about; and names of parts that it lacks.

    Raises:
        MessageError: a part is not as the layout says, or is not what its digest says, or nobody asked for it.
    """
    digests_of = {
        f"{tier}.{factor}.{number}": one
        for tier, factors in message.tiers.items()
        for factor, all_of_them in factors.items()
        for number, one in enumerate(all_of_them)
    }
    digests_of |= {f"head.{number}": one for number, one in enumerate(message.head or [])}
    if odd := set(message.parts) - set(digests_of):
        raise MessageError(f"parts {_names(dict.fromkeys(odd))} came without a digest: expected {_names(digests_of)}")
    now: dict[str, Stack] = {}
    lacking = []
    for name, expected in digests_of.items():
        layout_of = layout.of(name)
        if name in message.parts:
            now[name] = read(message.parts[name], layout_of, name)
            if digest(now[name], 0) != expected:
                raise MessageError(f"{name} is damaged: its digest is not what the message says")
        elif expected == 0:
            now[name] = layout_of
        elif name in held and digest(held[name], 0) == expected:
            now[name] = held[name]
        else:
            lacking.append(name)
    return now, lacking


def downloaded(message: Order, parts: Mapping[str, Stack]) -> Download:
    """The download of one client, of the parts that it holds (`received`)."""
    tiers = {}
    for tier, factors in message.tiers.items():
        if not factors:
            raise MessageError(f"tier {tier} has neither A nor B")
        halves = [
            _together([parts[f"{tier}.{factor}.{i}"] for i in range(len(found))]) for factor, found in factors.items()
        ]
        table = halves[0] if len(halves) == 1 else halves[0].joined(halves[1])
        tiers[tier] = Rows(table, _slots(next(iter(factors.values())), tier in message.choices))
    head = None
    if message.head is not None:
        head = Rows(
            _together([parts[f"head.{i}"] for i in range(len(message.head))]),
            _slots(message.head, "head" in message.choices),
        )
    blocks = None if message.blocks is None else message.blocks[None]
    return Download(message.errand.stage, tiers, head, message.errand.round, blocks)


def _together(rows: list[Any]) -> Any:
    named = [row.tensors() for row in rows]
    return rows[0].like({name: torch.cat([one[name] for one in named]) for name in named[0]})


def _slots(found: list[int], several: bool) -> Tensor:
    """The rows of the only client: -1 where there is none."""
    slot = torch.where(torch.tensor(found) != 0, torch.arange(len(found)), -1)
    return slot[None] if several else slot


def done(upload: Upload, errand: Errand) -> Done:
    """The message with what one client sends back."""
    return Done(
        errand=errand,
        client=int(upload.clients),
        images=int(upload.images),
        tiers={tier: written(table) for tier, table in upload.tiers.items()},
        head=None if upload.head is None else written(upload.head),
        choice=None if upload.choice is None else int(upload.choice),
        scores=None if upload.scores is None else upload.scores[0],
    )


def uploaded(message: Done, expected: Upload) -> Upload:
    """The upload of one client, of the same tiers, factors, shapes and dtypes as the one that is expected.

    Raises:
        MessageError: it has others.
    """
    if set(message.tiers) != set(expected.tiers):
        raise MessageError(f"adapters of {_names(message.tiers)} were sent, expected {_names(expected.tiers)}")
    for name in ("head", "choice", "scores"):
        sent, wanted = getattr(message, name) is not None, getattr(expected, name) is not None
        if sent != wanted:
            raise MessageError(f"{'a' if sent else 'no'} {name} was sent, expected {'one' if wanted else 'none'}")
    return Upload(
        torch.tensor([message.client]),
        torch.tensor([message.images]),
        {tier: read(message.tiers[tier], table, tier) for tier, table in expected.tiers.items()},
        None if message.head is None or expected.head is None else read(message.head, expected.head, "the head"),
        None if message.choice is None else torch.tensor([message.choice]),
        None if message.scores is None else message.scores[None],
    )


def together(uploads: list[Upload]) -> Upload:
    """The uploads of several clients, at least one, as one."""
    first = uploads[0]
    return Upload(
        torch.cat([one.clients for one in uploads]),
        torch.cat([one.images for one in uploads]),
        {tier: _together([one.tiers[tier] for one in uploads]) for tier in first.tiers},
        None if first.head is None else _together([one.head for one in uploads]),
        None if first.choice is None else torch.cat([one.choice for one in uploads if one.choice is not None]),
        None if first.scores is None else torch.cat([one.scores for one in uploads if one.scores is not None]),
    )
