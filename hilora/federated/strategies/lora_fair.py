"""LoRA-FAIR (Bian et al., Federated LoRA Fine-Tuning with Aggregation and Initialization Refinement, ICCV 2025): the
mean of B is corrected, so that its product with the mean of A comes near the mean of the products."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import Stage, Upload
from hilora.federated.settings import Number, Settings
from hilora.federated.strategies.fedit import FedIT


class LoRAFAIR(FedIT):
    """Clients train A, B and the head; the server sends Ā and `B̄ + ΔB`, from which the next round starts, too:

        ΔB = argmin S(ΔW, (B̄ + ΔB) Ā) + λ ‖ΔB‖        ΔW = Σ π_i B_i A_i,  Ā = Σ π_i A_i,  B̄ = Σ π_i B_i

    The paper's S is by the cosine between the two, and is brought down by SGD on the server, whose steps it leaves
    open. Ours: S is the squared distance and the penalty is squared, a ridge regression with a closed form,

        ΔB = (ΔW − B̄ Ā) Āᵀ (Ā Āᵀ + λ s I)⁻¹

    with s the mean squared norm of a row of Ā, so that λ means the same at every scale and width. At λ = 0 both have
    one optimum, the projection of ΔW on the rows of Ā: no other B comes nearer to ΔW, in distance or in angle. ΔW is
    the whole mean of products, not one of low rank.
    """

    class Settings(Settings):
        residual_penalty: Number = Field(0.01, ge=0, description="λ, what keeps the correction of the mean B small")

    name = "lora-fair"
    settings: Settings

    @property
    def sums(self) -> bool:
        return False  # the products are needed as well

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if not upload.images.sum() > 0:
            return {}
        sent, before = upload.tiers["root"], self.root
        super().aggregate(stage, upload)
        wanted = self.averaging.products(sent, upload.images, before)
        pairs = zip(self.root.factors, wanted, strict=True)
        B = [corrected(mean_A, mean_B, *product, self.settings.residual_penalty) for (mean_A, mean_B), product in pairs]
        self.root = AdapterTable(self.root.A, B)
        return {}


def corrected(mean_A: Tensor, mean_B: Tensor, A: Tensor, B: Tensor, penalty: float) -> Tensor:
    """`B̄ + ΔB` for the means A `[..., r, in]` and B `[..., out, r]`, and a product as A `[..., R, in]` and B
    `[..., out, R]`. Where rows of the mean A depend on each other and nothing is penalised, the smallest such ΔB."""
    dtype = torch.promote_types(mean_A.dtype, torch.float64)
    mean_A, mean_B, A, B, kept = mean_A.to(dtype), mean_B.to(dtype), A.to(dtype), B.to(dtype), mean_B.dtype
    gram = mean_A @ mean_A.mT
    scale = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    missing = B @ (A @ mean_A.mT) - mean_B @ gram  # (ΔW − B̄ Ā) Āᵀ
    ridge = gram + penalty * scale * torch.eye(gram.shape[-1], dtype=dtype, device=gram.device)
    found: Tensor = mean_B + missing @ torch.linalg.pinv(ridge, hermitian=True)
    return found.to(kept)
