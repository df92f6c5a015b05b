"""What travels between the server and its clients. What a message weighs is the traffic: there is no other count.

In the simulation the messages of n clients are one struct: tables that they share out among themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable, Stack, row_bytes

S = TypeVar("S", bound=Stack)


class Stage(NamedTuple):
    """Rounds that are alike.

    Attributes:
        tier: which one is trained.
        rounds: how many.
        rates: the tier whose learning rates are used.
        task: what the clients are to do, where a method's clients do several things.
        private: nothing travels: every client trains, whatever the participation.
    """

    tier: str
    rounds: int
    rates: str
    task: str = "train"
    private: bool = False


class Head(Stack):
    """S classifier heads: `weight` `[S, classes, features]` and `bias` `[S, classes]`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight, bias

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight, "bias": self.bias}

    def like(self, tensors: dict[str, Tensor]) -> Head:
        return Head(**tensors)


@dataclass(frozen=True)
class Rows(Generic[S]):
    """Rows of a table, one for each of n clients: `slot` is int64 `[n]`, -1 for none; or `[n, K]`, several for each."""

    table: S
    slot: Tensor

    def of(self, clients: Tensor) -> Rows[S]:
        """The same for some of the n clients, by their places `[m]`."""
        return Rows(self.table, self.slot[clients])

    def taken(self) -> S:
        """A copy for each client, `[n, ...]`."""
        return self.table.rows(self.slot)

    def picked(self, choice: Tensor) -> Rows[S]:
        """Of several rows for each client the one that it chose, int64 `[n]`."""
        return Rows(self.table, self.slot.gather(1, choice[:, None]).squeeze(1))


def shared(table: S, clients: Tensor) -> Rows[S]:
    """What n clients share: the only row."""
    return Rows(table, torch.zeros(len(clients), dtype=torch.long))


def own(table: S) -> Rows[S]:
    """A row for each client, in their order."""
    return Rows(table, torch.arange(len(table)))


def fitted(rows: Rows[AdapterTable], ranks: Tensor) -> Rows[AdapterTable]:
    """The same for clients that hold so many ranks each, int64 `[n]`: the leading ones of their adapters."""
    if bool((ranks >= rows.table.r).all()):
        return rows
    wanted = ranks.view(-1, *[1] * (rows.slot.dim() - 1)).expand_as(rows.slot)
    pairs, place = torch.stack([rows.slot.flatten(), wanted.flatten()]).unique(dim=1, return_inverse=True)
    table = rows.table.rows(pairs[0].clamp_min(0)).leading(pairs[1])
    return Rows(table, place.view_as(rows.slot).where(rows.slot >= 0, -1))


class Part(NamedTuple):
    """A piece of a message that a client may hold already: rows of one table, and their weight."""

    name: str
    table: Stack
    slot: Tensor  # int64 [n]

    def nbytes(self) -> Tensor:
        """Bytes for each client, int64 `[n]`."""
        return torch.where(self.slot >= 0, self.table.nbytes()[self.slot], 0)


@dataclass(frozen=True)
class Download:
    """What the server has for n clients.

    Attributes:
        stage: what they are to do.
        tiers: adapters of the tiers that the client does not have by itself; a table may hold A or B alone.
        head: the classifier head, unless the client has its own.
        round: number of the round in its stage, from 1; 0 outside of rounds.
        blocks: bool `[n, L]`, the blocks whose adapters each client trains; None: all. Like the two above, it counts
            for no traffic.
    """

    stage: Stage
    tiers: Mapping[str, Rows[AdapterTable]] = field(default_factory=dict)
    head: Rows[Head] | None = None
    round: int = 0
    blocks: Tensor | None = None

    def at(self, round: int) -> Download:
        return replace(self, round=round)

    def of(self, clients: Tensor) -> Download:
        """The same for some of the n clients, by their places `[m]`."""
        tiers = {tier: rows.of(clients) for tier, rows in self.tiers.items()}
        head = None if self.head is None else self.head.of(clients)
        return replace(self, tiers=tiers, head=head, blocks=None if self.blocks is None else self.blocks[clients])

    def parts(self) -> Iterator[Part]:
        """What is sent, piece by piece: each factor of each tier, and the head."""
        for tier, rows in self.tiers.items():
            for factor in "AB":
                if getattr(rows.table, factor):
                    for number, slot in enumerate(rows.slot.view(len(rows.slot), -1).unbind(1)):
                        yield Part(f"{tier}.{factor}.{number}", rows.table.only(factor), slot)
        if self.head is not None:
            for number, slot in enumerate(self.head.slot.view(len(self.head.slot), -1).unbind(1)):
                yield Part(f"head.{number}", self.head.table, slot)

    def counted(self) -> Iterator[Part]:
        """The pieces that traffic counts: those that are sent, unless a method's own messages would have others."""
        yield from self.parts()

    def nbytes(self) -> Tensor:
        """Bytes for each client that holds nothing of it, int64 `[n]`."""
        return sum((part.nbytes() for part in self.counted()), start=torch.zeros((), dtype=torch.long))


class Sends(NamedTuple):
    """What a client sends back in a stage.

    Attributes:
        tiers: which factors of which tiers, "AB" or one of them.
        head: whether the head.
        choices: among how many adapters it names a choice; 0: it names none.
        partial: whether it may leave out some projections.
        scores: how many numbers it sends, one for each block; 0: none.
    """

    tiers: Mapping[str, str] = {}
    head: bool = False
    choices: int = 0
    partial: bool = False
    scores: int = 0


@dataclass(frozen=True)
class Upload:
    """What n clients send back.

    Attributes:
        clients: int64 `[n]`, who they are.
        images: int64 `[n]`, how many images each trained on: its weight in a mean.
        tiers: adapters `[n, ...]`; a table may hold A or B alone.
        head: heads `[n, ...]`.
        choice: int64 `[n]`, which of several adapters each took.
        scores: float32 `[n, L]`, how much each block matters to a client.
    """

    clients: Tensor
    images: Tensor
    tiers: Mapping[str, AdapterTable] = field(default_factory=dict)
    head: Head | None = None
    choice: Tensor | None = None
    scores: Tensor | None = None

    def rows(self, index: Tensor) -> Upload:
        """The messages of some of the n clients, by their places `[m]` or by a mask."""
        return Upload(
            self.clients[index],
            self.images[index],
            {tier: table.rows(index) for tier, table in self.tiers.items()},
            None if self.head is None else self.head.rows(index),
            None if self.choice is None else self.choice[index],
            None if self.scores is None else self.scores[index],
        )

    def nbytes(self) -> Tensor:
        """Bytes of each client's message, int64 `[n]`; its envelope (who, how many images) is not counted."""
        total = torch.zeros(len(self.clients), dtype=torch.long)
        for stack in (*self.tiers.values(), *([] if self.head is None else [self.head])):
            total += stack.nbytes()
        for numbers in (self.choice, self.scores):
            total += 0 if numbers is None else row_bytes(numbers)
        return total
