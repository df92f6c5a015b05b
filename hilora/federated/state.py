"""Adapters and heads of many clients as stacked tensors, and what a client's model is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors `[S, ...]`: one row for each of S adapters or heads.

Adapters have, for the bank i of each shape of projection, `A{i}` `[S, P, r, in]` and `B{i}` `[S, P, out, r]`; heads
have `weight` `[S, classes, features]` and `bias` `[S, classes]`.
"""


class Table(NamedTuple):
    """Adapters or heads that n clients share out among themselves."""

    state: State  # tensors [S, ...]
    slot: Tensor  # int64 [n], which of the S a client uses, -1 for none

    def rows(self, clients: Tensor) -> Table:
        """The same for some of the n clients, by their places `[m]`."""
        return Table(self.state, self.slot[clients])

    def taken(self) -> State:
        """A copy for each client, `[n, ...]`."""
        return {name: value[self.slot] for name, value in self.state.items()}


class Models(NamedTuple):
    """What n clients predict with: their adapter of each tier, and their head. A tier that is absent adds nothing."""

    tiers: dict[str, Table]
    head: Table

    def rows(self, clients: Tensor) -> Models:
        """The same for some of the n clients, by their places `[m]`."""
        return Models({tier: table.rows(clients) for tier, table in self.tiers.items()}, self.head.rows(clients))

    def replaced(self, tier: str, trained: Trained) -> Models:
        """The same with what the clients trained."""
        own = torch.arange(len(self.head.slot))
        return Models({**self.tiers, tier: Table(trained.adapters, own)}, Table(trained.head, own))


class Trained(NamedTuple):
    """What n clients send back."""

    adapters: State  # [n, ...], of the tier that was trained
    head: State  # [n, ...]
    images: Tensor  # [n], how many images each trained on
    loss: Tensor  # [n], mean over the steps; NaN for a client without any

    def put(self, clients: Tensor, adapters: State, head: State, loss: Tensor) -> None:
        """Enter what some of the n clients trained, by their places `[m]`; of more rows than that the first count."""
        for kept, values in ((self.adapters, adapters), (self.head, head)):
            for name, value in values.items():
                if name not in kept:
                    kept[name] = torch.empty(len(self.images), *value.shape[1:], dtype=value.dtype)
                kept[name][clients] = value[: len(clients)].cpu()
        self.loss[clients] = loss[: len(clients)].cpu()

    def rows(self, clients: Tensor) -> Trained:
        """The same for some of the n clients, by their places or by a mask."""
        adapters, head = ({name: value[clients] for name, value in state.items()} for state in self[:2])
        return Trained(adapters, head, self.images[clients], self.loss[clients])


Fit = Callable[[Tensor, Models, str, int], Trained]
"""Local training of clients (ids `[n]`) from their models, of a tier, for some epochs."""


def mean(state: State, weights: Tensor) -> State:
    """The weighted mean of the rows, tensor by tensor, as one row: `[1, ...]`."""
    share = weights.double() / weights.sum()
    return {
        name: torch.einsum("n,n...->...", share.to(value.device, value.dtype), value)[None]
        for name, value in state.items()
    }


def stream(seed: int, purpose: str, *ids: int) -> torch.Generator:
    """A random stream of its own for each purpose and combination of ids, such as ("training", round, client)."""
    key = (*purpose.encode(), 256, *ids)  # 256 is no byte: no purpose runs into the ids
    entropy = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0]))
