"""What a partition is: settings, and a way to divide a labelled image set among clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.data.images import ImageSet


class PartitionError(InvalidValueError):
    """The images cannot be divided as asked."""


@dataclass(frozen=True)
class Client:
    """The images of one client.

    Attributes:
        train: int64 `[n]`, indices into the training set; no other client has them.
        val: int64 `[n]`, the same, kept from training.
        test: int64 `[n]`, indices into the test set; other clients may have them too.
        group: its true group, an index into the population's `groups`, or None where the partition has none.
        seen: whether it takes part in training; the others are the unseen clients.
    """

    train: Tensor
    val: Tensor
    test: Tensor
    group: int | None
    seen: bool


@dataclass(frozen=True)
class Population:
    """All clients of a simulation, and the scheme that divided the images among them.

    Attributes:
        clients: N of them; a client's id is its place.
        scheme: the partition's name, such as sc-dir.
        groups: names of the true groups, empty where there are none.
    """

    clients: tuple[Client, ...]
    scheme: str
    groups: tuple[str, ...]

    @property
    def seen(self) -> Tensor:
        """Int64 ids of the clients that take part in training, ascending."""
        return torch.tensor([i for i, client in enumerate(self.clients) if client.seen], dtype=torch.int64)

    @property
    def unseen(self) -> Tensor:
        """Int64 ids of the clients that are held out, ascending."""
        return torch.tensor([i for i, client in enumerate(self.clients) if not client.seen], dtype=torch.int64)

    @property
    def true_groups(self) -> Tensor | None:
        """Int64 `[N]`, the true group of every client, or None where the partition has none."""
        groups = [client.group for client in self.clients if client.group is not None]
        return torch.tensor(groups, dtype=torch.int64) if groups else None

    def class_counts(self, labels: Tensor, classes: int) -> Tensor:
        """Int64 `[N, classes]`, the training images that a client has of a class, from the training set's `labels`."""
        return torch.stack([torch.bincount(labels[client.train], minlength=classes) for client in self.clients])

    def check(self, train: ImageSet, test: ImageSet) -> None:
        """Sees that this is a population over these images.

        Raises:
            PartitionError: an index is not of the images, an image has two owners, groups are known of some clients
                only or have no name, or no client takes part in training.
        """
        for i, client in enumerate(self.clients):
            for name, of in (("train", train), ("val", train), ("test", test)):
                rows = getattr(client, name)
                fits = rows.dtype == torch.int64 and rows.ndim == 1
                fits = fits and (len(rows) == 0 or bool(rows.min() >= 0 and rows.max() < len(of)))
                found, what = f"{rows.dtype} {list(rows.shape)}", f"int64 [n], indices into {len(of)} images"
                require(fits, f"{self.scheme}: {name} of client {i} is {found}, expected {what}")
        require(len(self.seen) > 0, f"{self.scheme}: no client takes part in training, expected one at least")
        owners = torch.bincount(torch.cat([rows for client in self.clients for rows in (client.train, client.val)]))
        twice = (owners > 1).nonzero().flatten().tolist()
        require(not twice, f"{self.scheme}: training images {twice[:5]} have several owners, expected one at most")
        groups = {client.group for client in self.clients}
        fits = groups == {None} if not self.groups else groups <= set(range(len(self.groups)))
        expected = f"an index into {self.groups} for every client" if self.groups else "None, as groups have no names"
        require(fits, f"{self.scheme}: groups of clients are {groups}, expected {expected}")


class Partition(BaseModel, ABC):
    """A way to divide a labelled image set among clients.

    A class has a `name`, its settings as fields (each with its default, bounds and a line of description) and
    `divide`. One in a file of this folder is found there; one that lives elsewhere is passed to `partition` as it is,
    or made known by `register`.

    Raises:
        PartitionError: settings that are unknown, missing or out of bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise PartitionError("; ".join(_say(self.name, wrong) for wrong in error.errors())) from error

    @abstractmethod
    def divide(self, train: ImageSet, test: ImageSet, seed: int) -> Population:
        """Divides a training set among clients and gives each a test set.

        Args:
            train: the training split, of which clients' training and validation images come.
            test: the test split, of the same classes.
            seed: of all that is random: the same settings and seed give the same population.

        Raises:
            PartitionError: what is asked for is impossible.
        """


def require(holds: bool, otherwise: str) -> None:
    """Raises PartitionError where a condition does not hold."""
    if not holds:
        raise PartitionError(otherwise)


_EXPECTED = {
    "greater_than_equal": "expected at least {ge}",
    "greater_than": "expected more than {gt}",
    "less_than_equal": "expected at most {le}",
    "less_than": "expected below {lt}",
    "extra_forbidden": "which {scheme} does not know: leave it out",
}


def _say(scheme: str, wrong: Any) -> str:
    """One error of pydantic's, in the words of this library."""
    name, context = ".".join(map(str, wrong["loc"])), wrong.get("ctx", {})
    if wrong["type"] == "missing":
        return f"{name} is missing, {scheme} needs it"
    if not name:  # of several settings together
        return str(context.get("error", wrong["msg"]))
    if context.get("gt") == 0:
        expected = "expected a positive number"
    else:
        expected = _EXPECTED.get(wrong["type"], wrong["msg"].replace("Input should be", "expected", 1))
    return f"{name} is {wrong['input']!r}, {expected.format(scheme=scheme, **context)}"
