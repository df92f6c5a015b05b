"""The rivals of an adapted attention layer, all with the same values in their adapters.

1. PEFT with all tiers as active adapters,
2. the same compiled,
3. the tiers stacked into two `addmm`,
4. the frozen tiers merged into the weight, with one live adapter beside it,
5. the frozen layer without adapters: the limit.

PEFT adapts a fused `qkv` as a whole, so there each tier has one A for q and v, and B is zero for k: the same function
as adapters on the slices q and v that share their A. Every rival's adapters have the dtype of the layer, which is
kinder to PEFT than its default (fp32 adapters, for which it casts x); ours are fp32, as they are in training.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hilora
from benchmarks.timing import DEVICE
from hilora.adapters.injection import banks

if TYPE_CHECKING:
    from benchmarks.operations.layer import Layer

SCALE = 2.0
TIERS = hilora.HiLoRAConfig.tiers


class Fused(nn.Module):
    """As in timm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.qkv(x),)


class Separate(nn.Module):
    """As in transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


class Problem(NamedTuple):
    """A frozen layer, and the adapters of its groups."""

    shape: Layer
    base: nn.Module
    A: list[Tensor]  # of each tier [S, r, in], one for q and v
    B: list[Tensor]  # [S, 2, out, r]: of q and of v
    slots: list[Tensor]  # int32 [G]

    @classmethod
    def of(cls, shape: Layer) -> Problem:
        """Root adapters are shared, cluster ones by every fourth client, the last tier's by none."""
        torch.manual_seed(0)
        width, rank, groups = shape.width, shape.rank, shape.groups
        base = (Fused if shape.form == "qkv" else Separate)(width).to(DEVICE, shape.torch_dtype).requires_grad_(False)
        tables = [1, min(4, groups), groups][3 - shape.tiers :]
        like = {"device": DEVICE, "dtype": shape.torch_dtype}
        A = [torch.randn(S, rank, width, **like) / width**0.5 for S in tables]  # type: ignore[call-overload]
        B = [0.02 * torch.randn(S, 2, width, rank, **like) for S in tables]  # type: ignore[call-overload]
        slots = [torch.arange(groups, device=DEVICE, dtype=torch.int32) % S for S in tables]
        return cls(shape, base, A, B, slots)

    @property
    def tiers(self) -> tuple[str, ...]:
        return TIERS[3 - self.shape.tiers :]

    def of_group(self, group: int) -> list[tuple[Tensor, Tensor]]:
        """A `[r, in]` and B `[2, out, r]` of each tier."""
        return [(A[slot[group]], B[slot[group]]) for A, B, slot in zip(self.A, self.B, self.slots, strict=True)]

    def layer(self) -> nn.Module:
        """The frozen layer once more, its weights the same memory."""
        return copy.deepcopy(self.base, {id(p): p for p in self.base.parameters()})


Pair = tuple[Tensor, Tensor]  # A and B


class Rival(NamedTuple):
    """Modules that compute an adapted layer: one for all groups, or one for each.

    Attributes:
        modules: from x `[G, M, in]`, or their group's `[1, M, in]`, to the outputs of the layer's products.
        live: the parameters of the last tier, for each module: of qkv, or of q and of v.
    """

    modules: list[nn.Module]
    live: list[list[Pair]]

    def trained(self) -> list[Tensor]:
        return [factor for pairs in self.live for pair in pairs for factor in pair]

    def gradients(self) -> list[Tensor]:
        """Of the last tier: A `[G, r, in]`, summed over q and v, and B `[G, 2, out, r]`."""
        found = []
        for pairs in self.live:
            parts = [(dA, dB) for A, B in pairs for dA, dB in zip(_parts(A.grad), _parts(B.grad), strict=True)]
            A, B = zip(*parts, strict=True)
            found.append((sum(A), torch.stack(B, 1) if len(B) == 2 else _slices(B[0])))
        return [torch.cat(factor) for factor in zip(*found, strict=True)]


def ours(problem: Problem, whole: bool = False) -> Rival:
    """Adapters on the slices q and v, or with `whole` on the fused `qkv`, as PEFT has them."""
    shape = problem.shape
    config = hilora.HiLoRAConfig(
        r=shape.rank,
        lora_alpha=SCALE * shape.rank,
        target_modules=("qkv",) if whole else ("q", "v"),
        tiers=problem.tiers,
    )
    example = torch.zeros(1, 1, shape.width, device=DEVICE, dtype=shape.torch_dtype)
    model = hilora.inject(problem.layer(), config, example)
    if shape.groups > 1:
        hilora.set_slots(model, **dict(zip(problem.tiers, problem.slots, strict=True)))
    (bank,) = banks(model)
    hilora.set_active_tier(model, last := problem.tiers[-1])
    for tier, A, B in zip(problem.tiers, problem.A, problem.B, strict=True):
        tables = (A.expand_as(bank.A(tier)), _whole(B)[None] if whole else B.transpose(0, 1))
        held = [table.detach().clone().contiguous().requires_grad_(tier == last) for table in tables]
        bank.hold(tier, held[0], held[1], bank.slots[tier])
    return Rival([model], [[bank.held[last]]])


def peft(problem: Problem) -> Rival:
    """A PEFT model for each group, over the same frozen weights: no adapters have to be switched."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.layer import LoraLayer

    shape, found = problem.shape, Rival([], [])
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=SCALE * shape.rank,
        target_modules=["qkv"] if shape.form == "qkv" else ["q", "v"],
    )
    for group in range(shape.groups):
        first, *others = problem.tiers
        model = get_peft_model(problem.layer(), config, adapter_name=first, autocast_adapter_dtype=False)
        for tier in others:
            model.add_adapter(tier, config, autocast_adapter_dtype=False)
        model.base_model.set_adapter(list(problem.tiers))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{problem.tiers[-1]}." in name)
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
        for tier, (A, B) in zip(problem.tiers, problem.of_group(group), strict=True):
            with torch.no_grad():
                for layer, part in zip(layers, _by_layer(problem.base, B).values(), strict=True):
                    layer.lora_A[tier].weight.copy_(A)
                    layer.lora_B[tier].weight.copy_(part)
        found.modules.append(model)
        last = problem.tiers[-1]
        found.live.append([(layer.lora_A[last].weight, layer.lora_B[last].weight) for layer in layers])
    return found


def compiled(rival: Rival) -> Rival:
    torch._dynamo.reset()  # each shape for itself: no shapes left open, no limit of recompilations
    return Rival([torch.compile(model, dynamic=False) for model in rival.modules], rival.live)  # type: ignore[misc]


class Stacked(nn.Module):
    """`addmm(linear(x), x Aᵀ, Bᵀ)` with the tiers side by side in A and B; `baddbmm` for several groups."""

    def __init__(self, base: nn.Linear, frozen: Sequence[tuple[Tensor, Tensor]], last: tuple[Tensor, Tensor]) -> None:
        """Of A `[G, r, in]` and B `[G, out, r]`."""
        super().__init__()
        self.base = base
        self.frozen_A = torch.cat([last[0][:, :0], *(A for A, _ in frozen)], 1)
        self.frozen_B = torch.cat([last[1][:, :, :0], *(SCALE * B for _, B in frozen)], 2)
        self.A, self.B = (nn.Parameter(factor.contiguous()) for factor in last)

    def forward(self, x: Tensor) -> Tensor:
        A = torch.cat([self.frozen_A, self.A], 1)  # [G, R, in]
        B = torch.cat([self.frozen_B, SCALE * self.B], 2)  # [G, out, R]
        y = F.linear(x, self.base.weight, self.base.bias)
        if len(A) > 1:
            return torch.baddbmm(y, x @ A.mT, B.mT)
        return torch.addmm(y[0], x[0] @ A[0].T, B[0].T)[None]


def stacked(problem: Problem) -> Rival:
    """What a careful engineer writes."""
    groups = [problem.of_group(group) for group in range(problem.shape.groups)]
    tiers = [(torch.stack([A for A, _ in one]), torch.stack([B for _, B in one])) for one in zip(*groups, strict=True)]
    return _with_stacked(problem.layer(), tiers[:-1], tiers[-1])


def merged(problem: Problem) -> Rival:
    """One live adapter beside a weight of its own for each group."""
    found = Rival([], [])
    for group in range(problem.shape.groups):
        *frozen, (last_A, last_B) = problem.of_group(group)
        layer = copy.deepcopy(problem.base)
        for A, B in frozen:
            for name, part in _by_layer(layer, B).items():
                weight = getattr(layer, name).weight
                weight += (SCALE * part.float() @ A.float()).to(weight.dtype)
        one = _with_stacked(layer, [], (last_A[None], last_B[None]))
        found.modules.extend(one.modules)
        found.live.extend(one.live)
    return found


def frozen(problem: Problem) -> Rival:
    return Rival([problem.base], [])


def _with_stacked(layer: nn.Module, others: Sequence[tuple[Tensor, Tensor]], last: tuple[Tensor, Tensor]) -> Rival:
    """Of A `[G, r, in]` and B `[G, 2, out, r]`."""
    pairs: list[Pair] = []
    for name, B in _by_layer(layer, last[1]).items():
        before = [(other_A, _by_layer(layer, other_B)[name]) for other_A, other_B in others]
        one = Stacked(getattr(layer, name), before, (last[0], B))
        setattr(layer, name, one)
        pairs.append((one.A, one.B))
    return Rival([layer], [pairs])


def _by_layer(layer: nn.Module, B: Tensor) -> dict[str, Tensor]:
    """B of q and v `[..., 2, out, r]` for the linear layers that have them."""
    if isinstance(layer, Fused):
        return {"qkv": _whole(B)}
    return dict(zip("qv", B.unbind(-3), strict=True))


def _whole(B: Tensor) -> Tensor:
    """`[..., 2, out, r]` of q and v as `[..., 3 out, r]` of qkv."""
    q, v = B.unbind(-3)
    return torch.cat([q, torch.zeros_like(q), v], -2)


def _slices(B: Tensor) -> Tensor:
    q, _, v = B.chunk(3, -2)
    return torch.stack([q, v], -3)


def _parts(gradient: Tensor | None) -> Sequence[Tensor]:
    """Of one adapter `[r, in]`, of a table `[G, r, in]`, of a bank's projections `[P, G, r, in]`: each `[G, r, in]`."""
    assert gradient is not None
    return [gradient[None]] if gradient.dim() == 2 else [gradient] if gradient.dim() == 3 else gradient.unbind(0)
