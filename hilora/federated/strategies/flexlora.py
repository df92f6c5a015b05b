"""FlexLoRA (Bai et al., Federated Fine-tuning of Large Language Models under Heterogeneous Tasks and Client Resources,
2024): products are averaged, and an SVD brings the mean back to a client's rank."""

from __future__ import annotations

from typing import Any

import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import Stage, Upload
from hilora.federated.strategies.fedit import FedIT


class FlexLoRA(FedIT):
    """`Σ π B A = U Σ Vᵀ`, then `B := U Σ` and `A := Vᵀ`, the leading r of each.

    Clients with a budget of ranks are sent as many leading directions as they can hold. In the mean they have zeros
    beyond, as published, so that directions that few can hold fade from round to round. Where the mean has fewer than r
    directions A keeps a row of its own (ours): with A and B both zero a rank would never be trained again. A tier is
    scaled by lora_alpha / rank for all clients. The head is averaged.
    """

    name = "flexlora"
    unequal = frozenset({"ranks"})

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if upload.images.sum() > 0 and upload.head is not None:
            averaged_A, averaged_B = [], []
            mean = self.averaging.product_mean(upload.tiers["root"], upload.images, self.root)
            for (A, B), old in zip(mean.factors, self.root.A, strict=True):
                sigma = A.norm(dim=-1, keepdim=True)  # A = Σ Vᵀ
                nothing = sigma <= torch.finfo(A.dtype).eps * sigma.amax(-2, keepdim=True)
                averaged_A.append(torch.where(nothing, old.to(A), A / sigma))
                averaged_B.append(B * sigma.mT)
            self.root = AdapterTable(averaged_A, averaged_B)
            self.head = self.averaging.mean(upload.head, upload.images, self.head)
        return {}
