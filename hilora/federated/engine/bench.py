"""What a local algorithm is, and what of the clients' shared forward pass it is given."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

from hilora.federated.engine.optim import Slotted
from hilora.federated.settings import TrainingSettings


class Bench(Protocol):
    """G clients in one forward pass, with what they train in place.

    Attributes:
        settings: how clients train.
        pixels: uint8 `[G, b, 3, h, w]`, where each batch of images is put.
        trained: the parameters of the tier in training, its composition and the heads.
    """

    settings: TrainingSettings
    pixels: Tensor
    trained: Sequence[Slotted]

    def predict(self, pixels: Tensor) -> Tensor:
        """Logits `[G, b, classes]` of images `[G, b, 3, h, w]`."""

    def penalty(self) -> Tensor:
        """What is added to the clients' losses, `[G]`, or 0 for all."""

    def factors(self, tier: str, factors: str, lr: float) -> list[Slotted]:
        """The factors of a tier that belong to each client by itself, to be trained at a rate."""

    def ranks(self, tier: str) -> Tensor:
        """How many ranks each client's adapter of a tier in training has, int `[G]`; it is written in place."""

    def holding(self, values: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        """Other tensors in the places of some parameters, by the ids of these."""


class Training(ABC):
    """The local training of G clients, batch by batch.

    Attributes:
        loss: `[G]`, the sum of each client's mean losses so far.
    """

    loss: Tensor

    @abstractmethod
    def begin(self, total: Tensor) -> None:
        """Start anew; `total` `[G]` is how many steps each client will take."""

    @abstractmethod
    def step(self, pixels: Tensor, target: Tensor) -> None:
        """One step on images uint8 `[G, b, 3, h, w]` and their labels `[G, b]`, -1 where there is no image."""


class LocalAlgorithm(ABC):
    """How a client trains. Two that are equal must train alike: a training that is set up serves again."""

    @property
    def more_tiers(self) -> tuple[str, ...]:
        """Tiers that it trains beside the one that it is asked to."""
        return ()

    @abstractmethod
    def training(self, bench: Bench) -> Training:
        """Set up the training of clients."""
