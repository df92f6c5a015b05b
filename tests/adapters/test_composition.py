"""When two compositions can share one captured training step."""

from __future__ import annotations

import torch
from torch import Tensor

from hilora.adapters.composition import Composition, Gains, Gate, Weights


class Louder(Composition):
    """One whose number is no tensor, and which says nothing of a key."""

    def __init__(self, volume: Tensor, times: float) -> None:
        self.volume, self.times = volume, times

    def tensors(self) -> dict[str, Tensor]:
        return {"volume": self.volume}

    def like(self, tensors: dict[str, Tensor]) -> Louder:
        return Louder(tensors["volume"], self.times)

    def gains(self, bank: int) -> Gains:
        return lambda position, x: {"root": self.times}


def test_values_of_tensors_make_no_other_key() -> None:
    assert Louder(torch.zeros(3), 2.0).key == Louder(torch.ones(3), 2.0).key
    weight = torch.randn(3, 4, 2, 8)
    assert Gate("leaf", "root", [weight]).key == Gate("leaf", "root", [weight + 1]).key


def test_all_else_makes_another_key() -> None:
    weight = torch.randn(3, 4, 2, 8)
    different = [
        Louder(torch.zeros(3), 2.0),
        Louder(torch.zeros(3), 3.0),
        Louder(torch.zeros(4), 2.0),
        Weights({"root": 0.5, "leaf": torch.ones(3)}),
        Weights({"root": 0.6, "leaf": torch.ones(3)}),
        Weights({"root": torch.ones(3), "leaf": 0.5}),
        Gate("leaf", "root", [weight]),
        Gate("root", "leaf", [weight]),
        Gate("leaf", "root", [weight, weight]),
    ]
    assert len({one.key for one in different}) == len(different)
