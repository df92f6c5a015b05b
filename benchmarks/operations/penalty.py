"""The orthogonality penalty of all projections of a ViT, value and gradient, against a loop over PEFT's modules."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import hilora
from benchmarks.contest import Contestant, Lineup
from benchmarks.cost import Cost
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE
from hilora.adapters.injection import banks
from hilora.kernels import use_backend

GAMMA = 0.1
TIERS = hilora.HiLoRAConfig.tiers


class Penalty(NamedTuple):
    width: int
    depth: int = 12  # blocks; twice as many projections
    rank: int = 8


def shapes(scale: str) -> list[Penalty]:
    if scale == "toy":
        return [Penalty(32, depth=2, rank=4)]
    widths = [768, 192, 384] if scale == "cpu" else [768, 192, 384, 1024]
    return [Penalty(width) for width in widths] + [Penalty(widths[0], rank=rank) for rank in (4, 16, 32)]


def cost(shape: Penalty) -> Cost:
    """The value and the gradient of a leaf against two frozen tiers, in fp32: `2·P·w·r²` FLOPs for each of two Gram
    matrices and as many for `B_f (B_fᵀ B)`; three factors read, one gradient written."""
    P, w, r = 2 * shape.depth, shape.width, shape.rank
    return Cost(((2 * 2 * 2 * P * w * r * r, 4 * 4 * P * w * r),))


class Blocks(nn.ModuleList):
    """Attention layers one after another; the penalty never calls them."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = sum(layer(x))
        return x


def lineup(shape: Penalty, phase: str, scale: str) -> Lineup:
    from benchmarks.rivals import Separate

    torch.manual_seed(0)
    base = Blocks(Separate(shape.width) for _ in range(shape.depth)).to(DEVICE)
    ours = hilora.inject(
        copy.deepcopy(base),
        hilora.HiLoRAConfig(r=shape.rank, target_modules=("q", "v")),
        torch.zeros(1, 1, shape.width, device=DEVICE),
    )
    hilora.set_active_tier(ours, "leaf")
    (bank,) = banks(ours)
    for tier in TIERS:
        B = torch.empty_like(bank.B(tier)).normal_(std=0.02)
        bank.hold(tier, bank.A(tier).detach(), B.detach().requires_grad_(tier == "leaf"))

    def batched() -> Tensor:
        bank.B("leaf").grad = None
        penalty = hilora.orthogonality_penalty(ours, gamma_root=GAMMA, gamma_cluster=GAMMA)
        penalty.backward()
        return penalty.detach()

    def by_reference() -> Tensor:
        with use_backend("reference"):
            return batched()

    def with_gradient(step: Any) -> Any:
        def result() -> list[Tensor]:
            value = step()
            gradient = bank.B("leaf").grad
            assert gradient is not None
            return [value, gradient[:, 0]]

        return result

    least = cost(shape)
    rivals = {
        "hilora": Contestant(batched, with_gradient(batched), least, 1e-5),
        "hilora, reference": Contestant(by_reference, with_gradient(by_reference), least, 1e-5),
    }
    if find_spec("peft"):
        rivals["loop over modules"] = _loop(base, shape, bank)
    return Lineup(rivals, {"": _truth(bank)}, lacking={} if find_spec("peft") else {"loop over modules": "peft"})


def _loop(base: nn.Module, shape: Penalty, bank: hilora.AdapterBank) -> Contestant:
    """One of PEFT's modules after another."""
    from peft.tuners.lora.layer import LoraLayer

    layers = [layer for layer in _with_peft(base, shape, bank).modules() if isinstance(layer, LoraLayer)]

    def one_by_one() -> Tensor:
        total = torch.zeros((), device=DEVICE)
        for layer in layers:
            leaf = layer.lora_B["leaf"].weight
            leaf.grad = None
            for tier in TIERS[:2]:
                total = total + GAMMA * (layer.lora_B[tier].weight.T @ leaf).square().sum()
        total.backward()
        return total.detach()

    def result() -> list[Tensor]:
        return [one_by_one(), torch.stack([layer.lora_B["leaf"].weight.grad for layer in layers])]

    return Contestant(one_by_one, result, cost(shape), 1e-5)


def _with_peft(base: nn.Module, shape: Penalty, bank: hilora.AdapterBank) -> nn.Module:
    """PEFT with three adapters, their B those of ours."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    config = LoraConfig(r=shape.rank, target_modules=["q", "v"])
    model: Any = get_peft_model(base, config, adapter_name=TIERS[0])
    for tier in TIERS[1:]:
        model.add_adapter(tier, config)
    theirs = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    with torch.no_grad():
        for tier in TIERS:
            for layer, B in zip(theirs, bank.B(tier).detach()[:, 0], strict=True):
                layer.lora_B[tier].weight.copy_(B).requires_grad_(tier == "leaf")
    found: nn.Module = model
    return found


def _truth(bank: hilora.AdapterBank) -> list[Tensor]:
    """Value and gradient in fp64, one projection after another."""
    root, cluster, leaf = (bank.B(tier).detach()[:, 0].double() for tier in TIERS)
    value, gradient = leaf.new_zeros(()), torch.zeros_like(leaf)
    for p in range(len(leaf)):
        for other in (root[p], cluster[p]):
            overlap = other.T @ leaf[p]
            value += GAMMA * overlap.square().sum()
            gradient[p] += 2 * GAMMA * other @ overlap
    return [value, gradient]


OPERATION = Operation("Orthogonality penalty, value and gradient", Penalty, shapes, lineup, place=5, first=1)
