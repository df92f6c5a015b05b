"""A training step of a ViT-B with adapters as one CUDA graph, and its share of the device's rate:
`python -m benchmarks.vit_step`.

The share (MFU) is of the FLOPs of the frozen model's forward pass and of its gradients down to the first adapter: what
adapters add counts as nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hilora
from benchmarks.cost import measured_rates
from benchmarks.timing import DEVICE, SCALES, SECONDS, Step, ready, take_turns

MODELS = {
    "toy": ("vit_tiny_patch16_224", 32, 2),
    "cpu": ("vit_tiny_patch16_224", 96, 8),
    "cuda": ("vit_base_patch16_224", 224, 64),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=DEVICE)
    scale = parser.parse_args(arguments).scale
    name, size, batch = MODELS[scale]
    torch.manual_seed(0)
    like = {"device": DEVICE, "dtype": torch.bfloat16}
    images = torch.randn(batch, 3, size, size, **like)  # type: ignore[call-overload]
    labels = torch.randint(100, (batch,), device=DEVICE)
    model = timm.create_model(name, img_size=size, num_classes=100).to(**like).requires_grad_(False)
    bare = _step(model, images.clone().requires_grad_(), labels)
    with FlopCounterMode(display=False) as counter:
        bare()
    adapted = hilora.inject(model, hilora.HiLoRAConfig(r=8, lora_alpha=16, target_modules=("q", "v")))
    hilora.set_active_tier(adapted, "leaf")
    seconds = take_turns({"": ready(_step(adapted, images, labels), [()])}, SECONDS[scale])[""].seconds
    share = counter.get_total_flops() / seconds / measured_rates(torch.bfloat16, scale).flops
    print(f"{name}, {batch} images of {size}: {1e3 * seconds:.2f} ms, {batch / seconds:.0f} images/s, MFU {share:.1%}")


def _step(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    def step() -> None:
        model.zero_grad()
        F.cross_entropy(model(images).float(), labels).backward()

    return step


if __name__ == "__main__":
    main()
