"""The projections of an attention layer, with three tiers of adapters on q and v: ours, and as PEFT does it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

import hilora
from hilora.inject import banks
from hilora.kernels import dispatch

TIERS = ("root", "cluster", "leaf")
GAMMA = 0.1


class Projections(nn.Module):
    """q, k and v as separate layers, as in transformers' ViT: the form in which PEFT adapts q and v alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.q(x), self.k(x), self.v(x)


class Blocks(nn.ModuleList):
    """Several of them, one after another."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__(Projections(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for projections in self:
            x = sum(projections(x))
        return x


def with_hilora(base: nn.Module, width: int, rank: int = 8) -> nn.Module:
    """Ours, the leaf in training, no adapter zero."""
    config = hilora.HiLoRAConfig(r=rank, lora_alpha=2 * rank, target_modules=("q", "v"))
    device = next(base.parameters()).device
    hilora.inject(base, config, example_input=torch.zeros(1, 1, width, device=device))
    hilora.set_active_tier(base, "leaf")
    with torch.no_grad():
        for bank in banks(base):
            for B in bank.B.values():
                B.normal_(std=0.02)
    return base


def with_peft(base: nn.Module, ours: nn.Module, rank: int = 8) -> PeftModel:
    """PEFT with three active adapters, of the same values as ours, the leaf in training."""
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q", "v"])
    model = get_peft_model(base, config, adapter_name=TIERS[0])
    for tier in TIERS[1:]:
        model.add_adapter(tier, config)
    model.base_model.set_adapter(list(TIERS))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".leaf." in name)
    layers = {name: layer for name, layer in ours.named_modules() if isinstance(layer, hilora.TieredLoRALinear)}
    with torch.no_grad():
        for name, layer in model.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                for tier in TIERS:
                    layer.lora_A[tier].weight.copy_(layers[name].lora_A[tier])
                    layer.lora_B[tier].weight.copy_(layers[name].lora_B[tier])
    return model


def reset(leaves: Iterable[Tensor]) -> None:
    """Forget gradients, as an optimiser does."""
    for leaf in leaves:
        leaf.grad = None


def peft_penalty(model: nn.Module) -> Tensor:
    """The orthogonality penalty as a loop over modules."""
    total = torch.zeros((), device=next(model.parameters()).device)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            leaf = module.lora_B["leaf"].weight
            for tier in ("root", "cluster"):
                total = total + GAMMA * (module.lora_B[tier].weight.T @ leaf).square().sum()
    return total


@contextmanager
def forced(backend: str | None) -> Iterator[None]:
    """Let an implementation serve, as `HILORA_BACKEND` does."""
    before, dispatch.FORCED = dispatch.FORCED, backend
    try:
        yield
    finally:
        dispatch.FORCED = before
