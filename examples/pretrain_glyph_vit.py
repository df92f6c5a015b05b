"""Pretrain the small ViT that `hilora.models.glyph_vit.glyph_vit` loads, on characters that no client has.

    python examples/pretrain_glyph_vit.py --out glyph_vit.safetensors

A few minutes on two CPU cores. Every epoch draws its images anew; the validation images are drawn once.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from hilora.federated.data.glyphs import PRETRAINING_SCRIPTS, pretraining_glyphs
from hilora.federated.data.images import ImageSet
from hilora.models.glyph_vit import new_glyph_vit

BATCH_SIZE = 64


def batches(data: ImageSet, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Shuffled batches of images float `[b, 3, h, w]` in [-1, 1] and labels int64 `[b]`."""
    for rows in torch.randperm(len(data.labels)).split(size):
        yield data.images[rows].float() / 127.5 - 1, data.labels[rows]


@torch.inference_mode()
def accuracy(model: nn.Module, data: ImageSet) -> float:
    """The fraction of images that the model names rightly."""
    right = sum(int((model(images).argmax(-1) == labels).sum()) for images, labels in batches(data, 500))
    return right / len(data.labels)


def train(model: nn.Module, seed: int, epochs: int, per_class: int, lr: float) -> None:
    """Train the model to name the pretraining characters, on `per_class` new images of each in every epoch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    characters = sum(len(script.characters) for script in PRETRAINING_SCRIPTS)
    steps = epochs * math.ceil(characters * per_class / BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps, pct_start=0.1)
    for epoch in range(epochs):
        start = time.perf_counter()
        drawn, _ = pretraining_glyphs(seed + 1 + epoch, per_class, 1)
        total = 0.0
        for images, labels in batches(drawn, BATCH_SIZE):
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(labels)
        speed = len(drawn.labels) / (time.perf_counter() - start)
        print(f"epoch {epoch + 1}/{epochs}  loss {total / len(drawn.labels):.3f}  {speed:.0f} images/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("glyph_vit.safetensors"))
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--per-class", type=int, default=20, help="images of each character in an epoch")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    timm.layers.set_fused_attn(False)  # trains much faster on a CPU
    torch.manual_seed(args.seed)
    _, valid = pretraining_glyphs(args.seed, train_per_class=1)
    model = new_glyph_vit(len(valid.classes))
    train(model, args.seed, args.epochs, args.per_class, args.lr)
    found = accuracy(model.eval(), valid)
    print(f"validation accuracy on {len(valid.classes)} characters: {found:.3f}")

    weights = {
        name: value.half().contiguous() for name, value in model.state_dict().items() if not name.startswith("head.")
    }
    metadata = {
        "made_by": "examples/pretrain_glyph_vit.py",
        "data": f"{valid.name}: {len(valid.classes)} characters of {', '.join(valid.group_names)}",
        "training": f"seed {args.seed}, {args.epochs} epochs of {args.per_class} images a character, lr {args.lr}",
        "validation_accuracy": f"{found:.3f}",
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = args.out.with_suffix(".unfinished")
    save_file(weights, unfinished, metadata)
    os.replace(unfinished, args.out)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
