"""Adapters and heads of many clients as stacked tensors, and what a client's model is made of."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

State = dict[str, Tensor]
"""Named tensors `[S, ...]`: one row for each of S adapters or heads.

Adapters have, for the bank i of each shape of projection, `A{i}` `[S, P, r, in]` and `B{i}` `[S, P, out, r]`, and
`gate{i}` `[S, P, 2, in]` where a gate weighs them; heads have `weight` `[S, classes, features]` and `bias`
`[S, classes]`.
"""


def factors(state: State) -> list[tuple[Tensor, Tensor]]:
    """A `[S, P, r, in]` and B `[S, P, out, r]` of every bank."""
    return [(state[name], state[f"B{name[1:]}"]) for name in state if name[0] == "A"]


def put(state: State, clients: Tensor, rows: State) -> None:
    """Write the rows `[n, ...]` of the clients `[n]` into a table of all clients."""
    for name, value in rows.items():
        state[name][clients] = value


def size(state: State, *names: str) -> int:
    """Numbers in one row, of the tensors whose names begin so; by default of all."""
    return sum(value[0].numel() for name, value in state.items() if not names or name.startswith(names))


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


def one_for_all(state: State, clients: Tensor) -> Table:
    """What n clients share: the only row."""
    return Table(state, torch.zeros(len(clients), dtype=torch.long))


class Mix(NamedTuple):
    """How the outputs of two tiers are weighed against each other in every layer: `own` by a, `shared` by 1 − a.

    With `gate{i}` in the table of `own`, a softmax gate makes a of each token.

    Attributes:
        own: a tier, and `shared` the other one.
        share: a, where no gate makes it; one number, or `[n]` for the clients.
        references: int64 `[n, m]`, training images of each client. In predictions a is then `share` times the mean
            cosine of an image's features to theirs, with `own` alone in the model; at least 0.
    """

    own: str
    shared: str
    share: float | Tensor = 0.5
    references: Tensor | None = None

    def rows(self, clients: Tensor) -> Mix:
        """The same for some of the n clients, by their places `[m]`."""
        share = self.share[clients] if isinstance(self.share, Tensor) else self.share
        return self._replace(share=share, references=None if self.references is None else self.references[clients])


class Models(NamedTuple):
    """What n clients predict with: their adapter of each tier, and their head. A tier that is absent adds nothing."""

    tiers: dict[str, Table]
    head: Table
    mix: Mix | None = None

    def rows(self, clients: Tensor) -> Models:
        """The same for some of the n clients, by their places `[m]`."""
        tiers = {tier: table.rows(clients) for tier, table in self.tiers.items()}
        return Models(tiers, self.head.rows(clients), self.mix and self.mix.rows(clients))

    def replaced(self, tier: str, trained: Trained) -> Models:
        """The same with what the clients trained."""
        own = torch.arange(len(self.head.slot))
        return self._replace(tiers={**self.tiers, tier: Table(trained.adapters, own)}, head=Table(trained.head, own))


class Trained(NamedTuple):
    """What n clients send back."""

    adapters: State  # [n, ...], of the tier that was trained
    head: State  # [n, ...]
    images: Tensor  # [n], how many images each trained on
    loss: Tensor  # [n], mean over the steps; NaN for a client without any
    lower: State = {}  # noqa: RUF012 -- [n, ...], of the tier at the lower level of a bilevel problem

    def put(self, clients: Tensor, states: tuple[State, State, State], loss: Tensor) -> None:
        """Enter what some of the n clients trained (adapters, head, lower), by their places `[m]`; of more rows than
        that the first count."""
        for kept, values in zip((self.adapters, self.head, self.lower), states, strict=True):
            for name, value in values.items():
                if name not in kept:
                    kept[name] = torch.empty(len(self.images), *value.shape[1:], dtype=value.dtype)
                kept[name][clients] = value[: len(clients)].cpu()
        self.loss[clients] = loss[: len(clients)].cpu()

    def rows(self, clients: Tensor) -> Trained:
        """The same for some of the n clients, by their places or by a mask."""
        adapters, head, lower = (
            {name: value[clients] for name, value in state.items()} for state in (*self[:2], self.lower)
        )
        return Trained(adapters, head, self.images[clients], self.loss[clients], lower)


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
