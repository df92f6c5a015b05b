"""Partitions that deal pools of images out to clients and draw each client's proportions over what it was dealt."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from hilora.federated.data.allocation import Bools, Ints, allocate, apportion, deal, hold_out
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.base import Client, Partition, PartitionError, Population, require

ALPHA = "the Dirichlet's concentration: the lower, the fewer classes a client has"


class Cells(NamedTuple):
    """The cell of each image; images of a cell are alike to a partition.

    Attributes:
        train: `[n]`, of the training images.
        test: `[n]`, of the test images.
        number: C, how many cells there are.
    """

    train: Ints
    test: Ints
    number: int


class Pools(NamedTuple):
    """What is dealt out.

    Attributes:
        cells: `[K, C]`, which cells each pool has.
        each: how many pools a client is dealt; where it is one, that is the client's true group if pools have names.
        names: of the K pools, or empty.
    """

    cells: Bools
    each: int = 1
    names: tuple[str, ...] = ()


class Dealt(Partition):
    """Every client is dealt some pools of cells and has target proportions over their cells.

    Targets are fitted to the images that there are. A client whose cells run out may end short of images, and one whose
    cells have few test images short of `test_images`.
    """

    clients: int = Field(ge=1, description="how many there are, the unseen ones included")
    unseen: float = Field(default=0.2, ge=0, lt=1, description="the share held out, evenly from the true groups")
    images_per_client: int | None = Field(
        default=None, description="training images of a client; by default all images of the classes in use are divided"
    )
    test_images: int = Field(default=100, ge=1, description="test images of a client")
    val_share: float = Field(
        default=0.25,
        ge=0,
        description="validation images for each training image, in the same proportions",
    )
    min_images: int = Field(default=2, ge=0, description="the fewest training images that a client may end with")
    max_tries: int = Field(default=100, ge=1, description="how often to draw until every client has min_images")

    @model_validator(mode="after")
    def _check_together(self) -> Dealt:
        left = round(self.unseen * self.clients) < self.clients
        require(left, f"unseen={self.unseen} of {self.clients} clients leaves none for training: lower it")
        if self.images_per_client is not None:
            least = max(self.min_images, 1)
            fits = self.images_per_client >= least
            require(fits, f"images_per_client is {self.images_per_client}, expected at least {least}")
        return self

    @property
    def concentration(self) -> float:
        """Of the Dirichlet distribution of a client's proportions; infinity gives equal shares."""
        return np.inf

    def cells(self, train: ImageSet, test: ImageSet) -> Cells:
        """The cell of each image: its class, if a partition does not say otherwise."""
        return Cells(train.labels.cpu().numpy(), test.labels.cpu().numpy(), len(train.classes))

    @abstractmethod
    def pools(self, train: ImageSet, present: Bools, rng: np.random.Generator) -> Pools:
        """What is dealt to the clients, of the cells `present [C]` in the training set.

        Raises:
            PartitionError: there is nothing to be dealt as asked.
        """

    def divide(self, train: ImageSet, test: ImageSet, seed: int) -> Population:
        require(train.classes == test.classes, "the training and the test set differ in classes, expected the same")
        require(len(train) > 0, f"{train.name} has no training images")
        rng = np.random.default_rng(seed)
        cells = self.cells(train, test)
        capacities = np.bincount(cells.train, minlength=cells.number)  # [C]
        pools = self.pools(train, capacities > 0, rng)
        dealt, counts, val_sizes = self._draw(pools, capacities, rng)
        val = np.stack([_divide(row, total, rng) for row, total in zip(counts, val_sizes, strict=True)])
        kept = counts - val
        part = np.full(len(cells.train), -1)  # i: training images of client i, N + i: its validation images
        for c in range(cells.number):
            owners = np.repeat(np.arange(2 * self.clients), np.concatenate([kept[:, c], val[:, c]]))
            part[rng.permutation(np.flatnonzero(cells.train == c))[: len(owners)]] = owners
        tests = [np.flatnonzero(cells.test == c) for c in range(cells.number)]
        group = dealt.argmax(1) if pools.names and pools.each == 1 else None
        alike = np.zeros(self.clients, np.int64) if group is None else group
        held_out = hold_out(alike, round(self.unseen * self.clients), rng)
        return Population(
            clients=tuple(
                Client(
                    train=torch.from_numpy(np.flatnonzero(part == i)),
                    val=torch.from_numpy(np.flatnonzero(part == self.clients + i)),
                    test=torch.from_numpy(_take(tests, _divide(kept[i], self.test_images, rng), rng)),
                    group=None if group is None else int(group[i]),
                    seen=i not in held_out,
                )
                for i in range(self.clients)
            ),
            scheme=self.name,
            groups=() if group is None else pools.names,
        )

    def _draw(self, pools: Pools, capacities: Ints, rng: np.random.Generator) -> tuple[Bools, Ints, Ints]:
        """Deals the pools and draws proportions until every client has `min_images`.

        Returns:
            Who has which pools `[N, K]`, images of each cell `[N, C]`, validation images among them `[N]`.
        """
        images = self.images_per_client
        size = None if images is None else images + round(images * self.val_share)
        room = pools.cells @ capacities
        _check_room(room, self.clients, pools.each, self.min_images if size is None else size)
        for _ in range(self.max_tries):
            dealt = deal(self.clients, len(pools.cells), pools.each, rng)
            counts = allocate(dealt @ pools.cells, capacities, size, self.concentration, rng)  # [N, C]
            val_sizes = np.rint(counts.sum(1) * self.val_share / (1 + self.val_share)).astype(np.int64)
            fewest = (counts.sum(1) - val_sizes).min()
            if fewest >= self.min_images:
                return dealt, counts, val_sizes
        raise PartitionError(
            f"{self.name}: in each of {self.max_tries} draws (max_tries) a client ended with too few training images, "
            f"in the last one with {fewest} where min_images is {self.min_images}: lower min_images or clients, or "
            "raise alpha"
        )


class Dirichlet(Dealt):
    """A client's proportions over its cells are drawn from Dirichlet(alpha)."""

    alpha: float = Field(gt=0, description=ALPHA)

    @field_validator("alpha", mode="before")
    @classmethod
    def _default(cls, value: object) -> object:
        """None is the default of the scheme, whichever that is."""
        return cls.model_fields["alpha"].default if value is None else value

    @property
    def concentration(self) -> float:
        return self.alpha


def check_each(each: int, pools: Bools, what: str) -> None:
    """Sees that so many of the pools `[K, C]` can be dealt to a client."""
    expected = f"1 to {len(pools)}, as many {what} as are in use"
    require(1 <= each <= len(pools), f"{what}_per_client is {each}, expected {expected}")


def _check_room(rooms: Ints, clients: int, each: int, size: int) -> None:
    """Sees whether clients of `size` images can have them from `each` of the pools with `rooms [K]` images."""
    rooms = np.sort(rooms)[::-1]
    crowd = -(-clients // len(rooms)) if each == 1 else 1  # clients that are sure to have the same pools
    for many, pools in ((clients, clients * each), (crowd, each)):
        need, room = many * size, rooms[:pools].sum()
        require(
            need <= room,
            f"{many} clients of {size} images each, validation included, need {need}, and their classes hold {room}: "
            "lower clients, images_per_client, min_images or val_share, or let them have more classes",
        )


def _divide(counts: Ints, total: int, rng: np.random.Generator) -> Ints:
    """Divides `total` in the proportions of `counts [C]`; nothing where these are all 0."""
    return apportion(counts * (total / max(counts.sum(), 1)), total, rng)


def _take(pools: list[Ints], counts: Ints, rng: np.random.Generator) -> Ints:
    """Draws `counts[c]` of the indices in `pools[c]`, or as many as there are."""
    return np.concatenate([rng.permutation(pool)[:count] for pool, count in zip(pools, counts, strict=True)])
