"""A ViT of timm, trained as timm trains: layer-wise decay of the learning rate, weight decay, a schedule, an average.

python examples/timm_layer_decay.py
"""

from __future__ import annotations

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy

import hilora

STEPS = 10


def main() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=4, num_classes=10, drop_path_rate=0.1)
    hilora.inject(model, hilora.HiLoRAConfig(r=8, lora_alpha=16, target_modules=("q", "v")))
    images, labels = torch.randn(32, 3, 32, 32), torch.arange(32) % 10
    for tier in ("root", "cluster", "leaf"):
        hilora.set_active_tier(model, tier)
        optimiser = create_optimizer_v2(model, opt="adamw", lr=3e-3, weight_decay=0.05, layer_decay=0.75)
        schedule = CosineLRScheduler(optimiser, t_initial=STEPS, warmup_t=2, warmup_lr_init=1e-4)
        averaged = ModelEmaV3(model, decay=0.9)
        for step in range(STEPS):
            schedule.step(step)
            loss = cross_entropy(model(images), labels) + hilora.orthogonality_penalty(model)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            averaged.update(model)
        scale = {id(p): group["lr_scale"] for group in optimiser.param_groups for p in group["params"]}
        rates = [scale[id(model.get_parameter(f"blocks.{i}.attn.qkv.lora_A.{tier}"))] for i in range(4)]
        print(f"{tier:7} loss {loss.item():.3f}, rates of the blocks × {', '.join(f'{rate:.2f}' for rate in rates)}")
    hilora.save_adapters(averaged, "runs/timm_layer_decay/averaged.safetensors")


if __name__ == "__main__":
    main()
