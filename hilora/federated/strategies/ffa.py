"""FFA-LoRA (Sun et al., Improving LoRA in Privacy-preserving Federated Learning, 2024): A stays at its random start."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.federated.engine.state import Trained, size
from hilora.federated.strategies.base import Traffic
from hilora.federated.strategies.fedit import FedIT


class FFALoRA(FedIT):
    """Only B and the head are trained and averaged: then the mean of the products is the product of the means.

    An unseen client's own training leaves A as it is, too.
    """

    factors = "B"

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        A = {name: value for name, value in self.root.items() if name[0] == "A"}
        noted = super().aggregate(tier, clients, trained)
        self.root |= A  # not even rounding touches it
        return noted

    def traffic(self, tier: str) -> Traffic:
        numbers = size(self.root, "B") + size(self.head)
        return Traffic(numbers, numbers)
