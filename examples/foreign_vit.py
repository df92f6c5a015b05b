"""A ViT of a library that this one has never heard of, adapted in ten lines.

python examples/foreign_vit.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import hilora


class Net(nn.Module):
    """Somebody's ViT, of PyTorch's own parts."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 64, 8, 8)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classify = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.classify(self.encoder(self.patches(x).flatten(2).mT).mean(1))
        return y


if __name__ == "__main__":
    torch.manual_seed(0)
    model, images, labels = Net(), torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    print(hilora.find_targets(model))
    hilora.inject(model, hilora.HiLoRAConfig(r=4, target_modules=("q", "v", "fc1"), modules_to_save=("classify",)))
    for tier in ("root", "cluster", "leaf"):
        hilora.set_active_tier(model, tier)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        for _ in range(10):
            loss = nn.functional.cross_entropy(model(images), labels) + hilora.orthogonality_penalty(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        print(f"{tier:7} trained, loss {loss.item():.3f}")
    hilora.merge_and_unload(model)  # a plain Net again
