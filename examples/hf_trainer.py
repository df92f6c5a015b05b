"""A ViT of transformers, trained tier by tier by its Trainer.

python examples/hf_trainer.py
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import hilora


class Noise(Dataset[dict[str, Any]]):
    """Images `[3, 32, 32]` of ten classes, as a processor of transformers would give them."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": index % 10}


def main(folder: str = "runs/hf_trainer") -> None:
    torch.manual_seed(0)
    model = ViTForImageClassification(
        ViTConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  image_size=32, patch_size=8, num_labels=10)
    )  # fmt: skip
    hilora.inject(model, hilora.HiLoRAConfig(r=4, target_modules=("q", "v")))
    arguments = TrainingArguments(
        folder, num_train_epochs=2, per_device_train_batch_size=16, learning_rate=3e-3, report_to=[],
        save_strategy="epoch", save_total_limit=1, logging_strategy="epoch", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip

    def loss(outputs: Any, labels: Tensor, **_: Any) -> Tensor:
        penalty = hilora.orthogonality_penalty(model, gamma_root=0.1, gamma_cluster=0.1)
        return cross_entropy(outputs.logits, labels) + penalty

    for tier in ("root", "cluster", "leaf"):
        hilora.set_active_tier(model, tier)  # and a Trainer of its own, with an optimiser for this tier
        done = Trainer(model, arguments, train_dataset=Noise(), compute_loss_func=loss).train()
        print(f"{tier:7} trained, loss {done.training_loss:.3f}")
    hilora.save_adapters(model, f"{folder}/adapters.safetensors")


if __name__ == "__main__":
    main()
