"""What a client has: its private state, the models that it trains and predicts with, what a training gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilora.adapters.composition import Composition
from hilora.adapters.table import AdapterTable, Stack
from hilora.federated.protocol import Head, Rows, Upload, own


class ClientStore:
    """The private states of so many clients, which the server never sees: named stacks with a row for each of them.

    `first` is the id of the first one: a machine that is one client has a store of that one alone.
    """

    def __init__(self, clients: int, first: int = 0) -> None:
        self.clients, self.first = clients, first
        self.tables: dict[str, Stack] = {}
        self.has: dict[str, Tensor] = {}  # bool [N]

    def of(self, clients: Tensor) -> ClientState:
        """The states of some clients, by their ids `[n]`."""
        return ClientState(self, clients)

    def state_dict(self) -> dict[str, Any]:
        return {"tables": self.tables, "has": self.has}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tables, self.has = dict(state["tables"]), dict(state["has"])


class ClientState(NamedTuple):
    """The private states of n clients, which they read and write."""

    store: ClientStore
    clients: Tensor  # int64 [n]

    @property
    def _places(self) -> Tensor:
        return self.clients - self.store.first

    def has(self, name: str) -> Tensor:
        """Which of the clients have such a row: bool `[n]`."""
        known = self.store.has.get(name)
        return torch.zeros(len(self.clients), dtype=torch.bool) if known is None else known[self._places]

    def rows(self, name: str) -> Rows[Any]:
        """The clients' rows; what one that has none reads is undefined."""
        return Rows(self.store.tables[name], self._places)

    def put(self, name: str, rows: Stack, where: Tensor | None = None) -> None:
        """Write a row of each client, or of those `where` the mask `[n]` says so."""
        if name not in self.store.tables:
            empty = {
                key: tensor.new_zeros(self.store.clients, *tensor.shape[1:]) for key, tensor in rows.tensors().items()
            }
            self.store.tables[name] = rows.like(empty)
            self.store.has[name] = torch.zeros(self.store.clients, dtype=torch.bool)
        places, rows = (self._places, rows) if where is None else (self._places[where], rows.rows(where))
        self.store.tables[name].put(places, rows)
        self.store.has[name][places] = True

    def filled(self, name: str, make: Callable[[], Stack]) -> Rows[Any]:
        """The clients' rows; those that have none get theirs of the n rows that `make` gives."""
        lacking = ~self.has(name)
        if lacking.any() or name not in self.store.tables:
            self.put(name, make(), lacking)
        return self.rows(name)


@dataclass(frozen=True)
class Models:
    """What n clients predict with: their adapter of each tier, and their head.

    Attributes:
        tiers: a tier that is absent adds nothing.
        head: of each client.
        composition: how their layers combine the tiers; None adds them.
        cluster: int64 `[n]`, the group whose adapters each uses; None where there are no groups.
    """

    tiers: Mapping[str, Rows[AdapterTable]]
    head: Rows[Head]
    composition: Composition | None = None
    cluster: Tensor | None = None

    def of(self, clients: Tensor) -> Models:
        """The same for some of the n clients, by their places `[m]`."""
        return Models(
            {tier: rows.of(clients) for tier, rows in self.tiers.items()},
            self.head.of(clients),
            None if self.composition is None else self.composition.rows(clients),
            None if self.cluster is None else self.cluster[clients],
        )

    def after(self, trained: Trained) -> Models:
        """The same with what the clients trained."""
        tiers = {tier: own(table) for tier, table in trained.tiers.items()}
        composition = self.composition if trained.composition is None else trained.composition
        return replace(self, tiers={**self.tiers, **tiers}, head=own(trained.head), composition=composition)


@dataclass(frozen=True)
class Trained:
    """What a local training gave n clients.

    Attributes:
        clients: int64 `[n]`, who they are.
        tiers: adapters `[n, ...]` of the tiers that were trained.
        head: heads `[n, ...]`.
        composition: of n rows, where it is trained, too.
        images: int64 `[n]`, how many images each trained on.
        loss: `[n]`, mean over the steps; NaN for a client without any.
    """

    clients: Tensor
    tiers: Mapping[str, AdapterTable]
    head: Head
    composition: Composition | None
    images: Tensor
    loss: Tensor

    def upload(self, *tiers: str, factors: str = "AB", head: bool = True) -> Upload:
        """The message with the adapters of some tiers, or of one factor of them, and the head. Scales are the
        server's, and are not sent back."""
        sent = {tier: self.tiers[tier].only(factors).scaled(None) for tier in tiers}
        return Upload(self.clients, self.images, sent, self.head if head else None)

    def where(self, mask: Tensor, models: Models) -> Trained:
        """The same, but for clients where the mask `[n]` is False as if they had no images: with what they started
        from, the models `[n]`."""
        composition = self.composition
        if composition is not None and models.composition is not None:
            composition = composition.where(mask, models.composition)
        return Trained(
            self.clients,
            {tier: table.where(mask, models.tiers[tier].taken()) for tier, table in self.tiers.items()},
            self.head.where(mask, models.head.taken()),
            composition,
            self.images * mask.cpu(),
            self.loss.masked_fill(~mask.to(self.loss.device), torch.nan),
        )

    def finite(self) -> Tensor:
        """Which clients' results are finite: bool `[n]`."""
        stacks: list[Stack] = [*self.tiers.values(), self.head, *([self.composition] if self.composition else [])]
        return torch.stack([stack.finite() for stack in stacks]).all(0)
