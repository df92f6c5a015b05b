"""What each client can hold, train and send: budgets of ranks and of layers, one for a share of the clients each."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.data.allocation import apportion
from hilora.federated.data.partitions import Population
from hilora.federated.settings import TrainingSettings, number_of_bytes, shares
from hilora.federated.streams import stream


class Budgets(NamedTuple):
    """The budgets of N clients.

    Attributes:
        group: int64 `[N]`, which of the shares of a setting each client is in; 0 for all where nothing is set.
        ranks: int64 `[N]`, the most ranks that a client holds of an adapter; None where that is not limited.
        layers: int64 `[N]`, the most blocks whose adapters it trains in a round; None likewise.
    """

    group: Tensor
    ranks: Tensor | None = None
    layers: Tensor | None = None

    @property
    def unequal(self) -> bool:
        """Whether anything is limited."""
        return self.ranks is not None or self.layers is not None

    @property
    def common(self) -> int | None:
        """The ranks that all of unequal clients hold; None where all hold the same."""
        return None if self.ranks is None or bool((self.ranks == self.ranks[0]).all()) else int(self.ranks.min())

    def rank(self, clients: Tensor, room: int) -> Tensor:
        """The ranks that clients `[n]` hold of adapters with room for so many: int64 `[n]`."""
        full = torch.full((len(clients),), room)
        return full if self.ranks is None else torch.minimum(full, self.ranks[clients])


def budgets(settings: TrainingSettings, population: Population) -> Budgets:
    """The budgets that the settings give the clients of a population. Seen and unseen clients have the same shares.

    Raises:
        InvalidValueError: the two kinds of budgets are of different shares, or follow true groups that there are not.
    """
    texts = settings.rank_budgets, settings.layer_budgets
    ranks, layers = ([] if text is None else shares(text) for text in texts)
    if ranks and layers and [share for share, _ in ranks] != [share for share, _ in layers]:
        raise InvalidValueError(
            f"rank_budgets={texts[0]!r} and layer_budgets={texts[1]!r} are of different shares: a client has one "
            "budget of both, so give the same shares"
        )
    group = torch.zeros(len(population.clients), dtype=torch.long)
    if len(ranks or layers) > 1:
        for name, clients in (("seen", population.seen), ("unseen", population.unseen)):
            group[_ordered(settings, population, clients, name)] = _dealt(ranks or layers, len(clients))
    of_group = [torch.tensor([value for _, value in given])[group] if given else None for given in (ranks, layers)]
    return Budgets(group, *of_group)


def fitted(
    settings: TrainingSettings, kinds: Collection[str], rank: int, adapter: AdapterTable, blocks: Sequence[Tensor]
) -> TrainingSettings:
    """The settings with budgets of bytes as budgets of ranks or of layers: the most of them that fit into a message.

    Args:
        settings: the training's; without `byte_budgets` they stay.
        kinds: what the method has budgets of, "ranks" or "layers".
        rank: the most ranks that a client's adapter can have.
        adapter: one row, of any ranks in all blocks, as it travels.
        blocks: for each shape of projection, int64 `[P]`, the block that each is in.

    Raises:
        InvalidValueError: not even one rank, or one block, fits.
    """
    if settings.byte_budgets is None:
        return settings
    sizes = torch.zeros(1 + max(int(of.max()) for of in blocks), dtype=torch.long)  # bytes of a rank in each block
    for (A, B), of in zip(adapter.factors, blocks, strict=True):
        sizes.index_add_(0, of, torch.full_like(of, (A[0, 0].nbytes + B[0, 0].nbytes) // adapter.r))
    kind, size, most = "layer", rank * int(sizes.max()), len(sizes)
    if "ranks" in kinds:
        kind, size, most = "rank", int(sizes.sum()), rank
    found = []
    for share, limit in shares(settings.byte_budgets, number_of_bytes):
        if limit < size:
            raise InvalidValueError(
                f"byte_budgets={settings.byte_budgets!r}: {limit} bytes are too few, a {kind} takes {size}: give as "
                "many at least"
            )
        found.append(f"{share}:{min(limit // size, most)}")
    return settings.model_copy(update={f"{kind}_budgets": ",".join(found)})


def _dealt(given: list[tuple[Fraction, int]], count: int) -> Tensor:
    """The shares as numbers of clients: int64 `[count]`, ascending."""
    exact = np.array([float(share * count) for share, _ in given])
    sizes = apportion(exact, count, np.random.default_rng(0))
    return torch.arange(len(given)).repeat_interleave(torch.from_numpy(sizes))


def _ordered(settings: TrainingSettings, population: Population, clients: Tensor, name: str) -> Tensor:
    """Clients in the order in which they get the shares."""
    order = torch.randperm(len(clients), generator=stream(settings.seed, f"budgets {name}"))
    if settings.budgets_follow == "images":
        images = torch.tensor([len(population.clients[int(client)].train) for client in clients])
        order = order[images[order].argsort(descending=True, stable=True)]
    elif settings.budgets_follow == "groups":
        groups = population.true_groups
        if groups is None:
            raise InvalidValueError(
                f"budgets_follow='groups': {population.scheme} has no true groups: choose chance or images"
            )
        order = order[groups[clients][order].argsort(stable=True)]
    return clients[order]
