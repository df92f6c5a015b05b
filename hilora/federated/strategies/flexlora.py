"""FlexLoRA (Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
2024): products are averaged, and an SVD brings the mean back to a client's rank."""

from __future__ import annotations

from typing import Any

from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import Stage, Upload
from hilora.federated.strategies.fedit import FedIT


class FlexLoRA(FedIT):
    """`Σ π B A = U Σ Vᵀ`, then `B := U Σ` and `A := Vᵀ`, the leading r of each.

    Clients with a budget of ranks are sent as many leading directions as they can hold. A tier is scaled by
    lora_alpha / rank for all of them. The head is averaged.
    """

    name = "flexlora"
    unequal = frozenset({"ranks"})

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if upload.images.sum() > 0 and upload.head is not None:
            averaged_A, averaged_B = [], []
            for A, B in self.averaging.product_mean(upload.tiers["root"], upload.images, self.root).factors:
                sigma = A.norm(dim=-1, keepdim=True)  # A = Σ Vᵀ
                averaged_A.append(A / sigma.clamp_min(1e-30))
                averaged_B.append(B * sigma.mT)
            self.root = AdapterTable(averaged_A, averaged_B)
            self.head = self.averaging.mean(upload.head, upload.images, self.head)
        return {}
