"""FlexLoRA (Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
2024): products are averaged, and an SVD brings the mean back to a client's rank."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hilora.algorithms.aggregation import product_space_mean
from hilora.federated.engine.state import Trained, factors, mean
from hilora.federated.strategies.fedit import FedIT


class FlexLoRA(FedIT):
    """`Σ π B A = U Σ Vᵀ`, then `B := U Σ` and `A := Vᵀ`, the leading r of each.

    The paper is about clients of different ranks. Here all have the same one, as in the comparison of HiLoRA's paper,
    so that one truncation serves them all. The head is averaged.
    """

    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        if trained.images.sum() > 0:
            for index, (A, B) in enumerate(factors(trained.adapters)):
                A, B = product_space_mean(A, B, trained.images, A.shape[-2])  # B = U, A = Σ Vᵀ
                sigma = A.norm(dim=-1, keepdim=True)
                self.root[f"A{index}"] = (A / sigma.clamp_min(1e-30))[None]
                self.root[f"B{index}"] = (B * sigma.mT)[None]
            self.head = mean(trained.head, trained.images)
        return {}
