"""Tiers whose outputs are weighed against each other in every layer, in place of being added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from hilora.adapters.bank import AdapterBank
from hilora.federated.engine.placement import Placement
from hilora.federated.engine.state import Mix


class Fixed(NamedTuple):
    """The same weights for all of an image's tokens: numbers, or `[G, b]` for the images of G clients."""

    gains: dict[str, float | Tensor]

    def __call__(self, position: int, x: Tensor) -> Mapping[str, float | Tensor]:
        return {
            tier: gain.repeat_interleave(x.shape[1] // gain.shape[1], 1) if isinstance(gain, Tensor) else gain
            for tier, gain in self.gains.items()
        }


class Gate(NamedTuple):
    """Weights that a softmax gate makes of each token: `weight` `[P, G, 2, in]`, the rows for `own` and `shared`."""

    own: str
    shared: str
    weight: Tensor

    def __call__(self, position: int, x: Tensor) -> Mapping[str, float | Tensor]:
        gains = (x @ self.weight[position].to(x.dtype).mT).float().softmax(-1)  # [G, M, 2]
        return {self.own: gains[..., 0], self.shared: gains[..., 1]}


def mix_tiers(
    banks: Sequence[AdapterBank], mix: Mix | None, placed: Placement, share: float | Tensor | None = None
) -> None:
    """Let the banks weigh tiers as `mix` says.

    Args:
        banks: of the model.
        mix: None: all tiers are added.
        placed: what is in the banks; has the gates.
        share: a, in place of the mix's own number: another one, or `[G, b]` for the images of G clients.
    """
    for index, bank in enumerate(banks):
        bank.composition = None
        if mix is None:
            continue
        gate = placed[mix.own][index].gate
        if gate is not None:
            bank.composition = Gate(mix.own, mix.shared, gate).__call__
        else:
            a = mix.share if share is None else share
            a = a.to(bank.device).view(len(a), -1) if isinstance(a, Tensor) else a  # [G, 1 or b]
            bank.composition = Fixed({mix.own: a, mix.shared: 1 - a}).__call__


def nearness(features: Tensor, references: Tensor) -> Tensor:
    """The mean cosine of images `[G, b, D]` to each client's references `[G, m, D]`, at least 0: `[G, b]`."""
    cosines = F.normalize(features, dim=-1) @ F.normalize(references, dim=-1).mT
    return cosines.mean(-1).clamp_min(0)
