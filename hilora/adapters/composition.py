"""How a layer combines its tiers: it adds them, unless a composition weighs them against each other."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from hilora.adapters.table import Stack

Gains = Callable[[int, Tensor], Mapping[str, float | Tensor]]
"""What weighs the tiers of a bank's layers: from a projection's number and its x `[G, M, in]`, for the tiers that it
names, a number or a tensor `[G, M]`."""


class Sight(Protocol):
    """What a composition can look at before it weighs tiers in a prediction."""

    def features(self, pixels: Tensor, composition: Composition) -> Tensor:
        """Features `[G, b, D]` of images uint8 `[G, b, 3, h, w]` under another composition."""

    def training_images(self, index: Tensor) -> Tensor:
        """The clients' training images uint8 `[G, m, 3, h, w]` of these indices `[G, m]`."""


class Composition(Stack):
    """How the layers of n clients' models combine their tiers; its rows are the clients'.

    Attributes:
        trained: whether its tensors are trained with the adapters, at their learning rate.
    """

    trained: ClassVar[bool] = False

    @abstractmethod
    def gains(self, bank: int) -> Gains:
        """What weighs the tiers in the layers of a bank."""

    @property
    def key(self) -> tuple[object, ...]:
        """What it is, with the shapes of its tensors in their place: two compositions with one key differ in the values
        of these alone."""
        return (type(self), _static(vars(self)))

    def seeing(self, sight: Sight) -> Callable[[Tensor], Composition]:
        """The composition that a prediction of the images `[G, b, 3, h, w]` takes; here the same for all."""
        return lambda pixels: self


def _static(value: object) -> object:
    """A value with the shapes of tensors in their place, such that it can be a key."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, Mapping):
        return tuple((name, _static(inner)) for name, inner in value.items())
    return tuple(map(_static, value)) if isinstance(value, list | tuple) else value


class Weights(Composition):
    """Fixed weights: `Σ_tier w_tier · tier(x)`.

    Args:
        weights: for the tiers named, one number for all, or a tensor `[n]` or `[n, b]` for clients and their images.
    """

    def __init__(self, weights: Mapping[str, float | Tensor]) -> None:
        self.weights = dict(weights)

    def tensors(self) -> dict[str, Tensor]:
        return {tier: weight for tier, weight in self.weights.items() if isinstance(weight, Tensor)}

    def like(self, tensors: dict[str, Tensor]) -> Weights:
        return Weights({**self.weights, **tensors})

    def gains(self, bank: int) -> Gains:
        def weigh(position: int, x: Tensor) -> Mapping[str, float | Tensor]:
            return {tier: _of_rows(weight, x) for tier, weight in self.weights.items()}

        return weigh


def _of_rows(weight: float | Tensor, x: Tensor) -> float | Tensor:
    """Weights `[G]` or `[G, b]` for each row of x `[G, b · tokens, in]`."""
    if not isinstance(weight, Tensor):
        return weight
    each = weight.to(x.device).view(len(weight), -1)  # [G, 1 or b]
    return each.repeat_interleave(x.shape[1] // each.shape[1], 1)


class Gate(Composition):
    """A softmax gate weighs two tiers for each token: `α(x) one + (1 − α(x)) other`, α linear in x without a bias.

    Args:
        one: a tier, and `other` the other one.
        weight: for every shape of projection, `[n, P, 2, in]`; the first row is that of `one`.
    """

    trained = True

    def __init__(self, one: str, other: str, weight: Sequence[Tensor]) -> None:
        self.one, self.other, self.weight = one, other, tuple(weight)

    def tensors(self) -> dict[str, Tensor]:
        return {f"gate.{index}": weight for index, weight in enumerate(self.weight)}

    def like(self, tensors: dict[str, Tensor]) -> Gate:
        return Gate(self.one, self.other, list(tensors.values()))

    def gains(self, bank: int) -> Gains:
        weight = self.weight[bank].transpose(0, 1)  # [P, G, 2, in]

        def weigh(position: int, x: Tensor) -> Mapping[str, float | Tensor]:
            shares = torch.softmax((x @ weight[position].to(x.dtype).mT).float(), -1)  # [G, M, 2]
            return {self.one: shares[..., 0], self.other: shares[..., 1]}

        return weigh
