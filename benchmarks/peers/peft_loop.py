"""Local training as papers' code has it: one client after another, PEFT in a timm model, images one by one."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from benchmarks.federation import GAMMAS, Federation
from hilora.adapters.table import AdapterTable
from hilora.federated.client import Models
from hilora.federated.data.images import ImageSet
from hilora.federated.protocol import Head
from hilora.federated.settings import TIERS
from hilora.models.backbone import Backbone


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Resized and normalised one by one, when they are asked for."""

    def __init__(self, images: ImageSet, backbone: Backbone) -> None:
        self.images, self.size = images, backbone.size
        self.mean, self.std = backbone.mean.view(3, 1, 1), backbone.std.view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images.images[index].float()[None]
        if image.shape[-1] != self.size:
            image = F.interpolate(image, size=(self.size, self.size), mode="bicubic", antialias=True)
        return ((image[0] / 255).clamp(0, 1) - self.mean) / self.std, self.images.labels[index]


class PeftLoop:
    """Trains the leaf adapter and the head of one client after another.

    Args:
        federation: the clients, with adapters on `targets`: PEFT adapts the fused `qkv` of timm's ViT as a whole.
        merged: fold root and cluster into the weights for each client, instead of three active adapters.
        tuned: forward passes under autocast to bf16, and on a CPU attention without torch's fused kernel, whose
            backward is slow there; instead of fp32 and timm's defaults.
    """

    def __init__(self, federation: Federation, merged: bool = False, tuned: bool = False) -> None:
        backbone, run = federation.backbone, federation.settings
        self.backbone, self.settings, self.device = backbone, run, federation.device
        self.merged, self.tuned = merged, tuned
        self.head = nn.Linear(backbone.features, len(federation.images.classes)).to(self.device)
        tiers = TIERS[2:] if merged else TIERS
        config = LoraConfig(r=run.rank["leaf"], lora_alpha=run.lora_alpha["leaf"], target_modules=self.targets)
        base: Any = self.base(backbone).to(self.device).requires_grad_(False)
        self.model = get_peft_model(base, config, adapter_name=tiers[0])
        for tier in tiers[1:]:
            self.model.add_adapter(tier, config)
        self.model.base_model.set_adapter(list(tiers))
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(".leaf." in name)
        self.layers = [layer for layer in self.model.modules() if isinstance(layer, LoraLayer)]
        self.frozen = [layer.get_base_layer().weight.clone() for layer in self.layers]

    targets: ClassVar[list[str]] = ["qkv"]

    def base(self, backbone: Backbone) -> nn.Module:
        """The ViT that PEFT adapts, in memory of its own."""
        model: Any = copy.deepcopy(backbone.model)
        for block in model.blocks:
            block.attn.fused_attn = not self.tuned or self.device.type == "cuda"
        found: nn.Module = model
        return found

    def batches(self, images: ImageSet, order: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
        """Images and labels of a client, in this order."""
        return DataLoader(Subset(Images(images, self.backbone), order.tolist()), batch_size=self.settings.batch_size)

    def features(self, pixels: Tensor) -> Tensor:
        """`[b, D]`."""
        found: Tensor = self.model(pixels)
        return found

    def train(self, images: ImageSet, orders: Sequence[Tensor], models: Models) -> tuple[AdapterTable, Head]:
        """A local epoch of each client.

        Args:
            images: of all clients.
            orders: for each client, the indices of its images in the order of its batches.
            models: what they start from; the adapters of one bank of 12 whole `qkv`.

        Returns:
            Leaf adapters and heads, as the batched engine gives them.
        """
        found = []
        for client, order in enumerate(orders):
            self._load(models.of(torch.tensor([client])))
            found.append(self._fit(self.batches(images, order)))
        A, B, weight, bias = (torch.stack(values) for values in zip(*found, strict=True))
        return AdapterTable([A], [B]), Head(weight, bias)

    def _fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """A and B `[P, …]` of the leaf, weight and bias of the head."""
        leaves = [p for p in self.model.parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW(
            [
                {"params": leaves, "lr": self.settings.lr["leaf"]},
                {"params": self.head.parameters(), "lr": self.settings.head_lr["leaf"]},
            ],
            weight_decay=self.settings.weight_decay,
        )
        self.model.train()
        for pixels, labels in batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.tuned):
                features = self.features(pixels.to(self.device))
            logits = self.head(features.float())
            loss = F.cross_entropy(logits, labels.to(self.device)) + self._penalty()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        A, B = (torch.stack([value.detach().clone() for value in self._factors("leaf", factor)]) for factor in "AB")
        return A, B, self.head.weight.detach().clone(), self.head.bias.detach().clone()

    def _penalty(self) -> Tensor:
        total = torch.zeros((), device=self.device)
        for tier, gamma in GAMMAS.items():
            for other, leaf in zip(self.before[tier], self._factors("leaf", "B"), strict=True):
                total = total + gamma * (other.T @ leaf).square().sum()
        return total

    def _factors(self, tier: str, factor: str) -> Iterator[Tensor]:
        return (getattr(layer, f"lora_{factor}")[tier].weight for layer in self.layers)

    @torch.no_grad()
    def _load(self, models: Models) -> None:
        """One client's adapters and head."""
        taken = {}
        for tier in TIERS:
            (A,), (B,) = (factor for factor in (models.tiers[tier].taken().A, models.tiers[tier].taken().B))
            taken[tier] = {"A": A[0].to(self.device), "B": B[0].to(self.device)}
        self.before = {tier: taken[tier]["B"].unbind(0) for tier in TIERS[:2]}
        for tier in TIERS[2:] if self.merged else TIERS:
            for factor in "AB":
                for weight, value in zip(self._factors(tier, factor), taken[tier][factor], strict=True):
                    weight.copy_(value)
        if self.merged:
            for index, (layer, frozen) in enumerate(zip(self.layers, self.frozen, strict=True)):
                delta = sum(
                    self.settings.lora_alpha[tier]
                    / self.settings.rank[tier]
                    * taken[tier]["B"][index]
                    @ taken[tier]["A"][index]
                    for tier in TIERS[:2]
                )
                layer.get_base_layer().weight.copy_(frozen + delta)
        for name, value in models.head.taken().tensors().items():
            getattr(self.head, name).copy_(value[0])
