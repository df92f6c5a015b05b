"""Adapters in your own model: one layer by hand, or a whole ViT, trained tier by tier and merged into plain weights.

python examples/drop_in_layers.py
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from torch import nn

import hilora


def one_layer() -> None:
    """A linear layer with three stacked adapters, in place of an nn.Linear."""
    layer = hilora.TieredLoRALinear(nn.Linear(64, 32), r=4, lora_alpha=8)
    hilora.set_active_tier(layer, "root")
    x, target = torch.randn(256, 64), torch.randn(256, 32)
    optimiser = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    before = F.mse_loss(layer(x), target).item()
    for _ in range(50):
        optimiser.zero_grad()
        F.mse_loss(layer(x), target).backward()
        optimiser.step()
    print(f"one layer: loss {before:.3f} → {F.mse_loss(layer(x), target).item():.3f}")


def two_clients_on_one_vit() -> None:
    """Two clients of one cluster, each with a leaf of its own, in one batch."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=10)
    hilora.inject(model, hilora.HiLoRAConfig(r=8, lora_alpha=16, target_modules=("q", "v")))
    images, labels = torch.randn(16, 3, 64, 64), torch.arange(16) % 10  # eight images of client 0, eight of client 1
    hilora.set_slots(model, cluster=torch.tensor([0, 0]), leaf=torch.tensor([0, 1]))
    for tier in ("root", "cluster", "leaf"):
        hilora.set_active_tier(model, tier)
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for _ in range(5):
            optimiser.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            (loss + hilora.orthogonality_penalty(model, gamma_root=0.1, gamma_cluster=0.1)).backward()
            optimiser.step()
        print(f"two clients: {tier:7} trained, loss {loss.item():.3f}")
    with torch.no_grad():
        adapted = model.eval()(images)[8:]
        plain = hilora.merge(model, cluster=0, leaf=1)
        print(f"merged for client 1: outputs differ by at most {float((plain(images[8:]) - adapted).abs().max()):.1e}")


if __name__ == "__main__":
    one_layer()
    two_clients_on_one_vit()
