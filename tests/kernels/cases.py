"""Calls of the stacked linear layer, in fp64 unless told otherwise, and what must come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hilora.kernels import Tier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Adapters(NamedTuple):
    """A tier to make: its rank, number of adapters, slots, columns, and the ranks and scales of its adapters."""

    rank: int
    slots: int = 1
    slot: list[int] | None = None
    columns: tuple[int, int] | None = None
    ranks: list[int] | None = None
    scales: list[float] | None = None


class Case(NamedTuple):
    shape: tuple[int, ...]  # of x
    out: int
    tiers: list[Adapters]
    bias: bool = True


Q, V = (0, 5), (10, 5)  # slices of a fused layer with 15 outputs
CASES = {
    "no tiers": Case((2, 3, 7), 5, []),
    "one tier": Case((4, 7), 5, [Adapters(2)]),
    "one row": Case((7,), 5, [Adapters(2)]),
    "no rows": Case((0, 7), 5, [Adapters(2)]),
    "three tiers of mixed ranks, no bias": Case((2, 3, 4, 7), 5, [Adapters(3), Adapters(1), Adapters(4)], bias=False),
    "four tiers": Case((3, 7), 5, [Adapters(1), Adapters(2), Adapters(3), Adapters(1)]),
    "rank above the widths": Case((3, 2), 3, [Adapters(5), Adapters(2)]),
    "q and v of qkv": Case((2, 3, 7), 15, [Adapters(2, columns=Q), Adapters(3, columns=Q), Adapters(2, columns=V)]),
    "k alone": Case((2, 3, 7), 15, [Adapters(2, columns=(5, 5))]),
    "q, k and v": Case((4, 7), 15, [Adapters(2, columns=(start, 5)) for start in (10, 0, 5)]),
    "columns that overlap by one": Case((4, 7), 15, [Adapters(2, columns=(0, 5)), Adapters(1, columns=(4, 5))]),
    "overlapping columns": Case(
        (4, 7),
        15,
        [Adapters(2, columns=(3, 6)), Adapters(1, columns=(5, 7)), Adapters(2), Adapters(1, columns=(14, 1))],
    ),
    "a shared tier, one by cluster, one by client": Case(
        (3, 4, 7), 5, [Adapters(2), Adapters(2, 2, [1, 0, 1]), Adapters(3, 9, [8, 0, 4])]
    ),
    "slots that repeat or are none": Case(
        (4, 2, 7), 15, [Adapters(2, 3, [2, -1, 2, 0], Q), Adapters(2, 1, [-1, 0, 0, -1], V)]
    ),
    "none at all": Case((2, 2, 7), 5, [Adapters(2, 3, [-1, -1])]),
    "an adapter for each group": Case((3, 2, 7), 5, [Adapters(2, 3), Adapters(1, 1)]),
    "one group": Case((1, 4, 7), 5, [Adapters(2, 2, [1]), Adapters(2, 1, [0]), Adapters(2)]),
    "one row a group": Case((3, 1, 7), 5, [Adapters(2, 2, [1, 0, 1])]),
    "empty tables": Case((2, 3, 7), 5, [Adapters(2, 0), Adapters(2, 0, [0, -1]), Adapters(1, 2, [1, 1])]),
    "a rank for each slot": Case(
        (3, 4, 7),
        15,
        [
            Adapters(4, 3, [2, 0, -1], Q, ranks=[3, 1, 0]),
            Adapters(3, 3, None, Q, ranks=[2, 3, 0]),
            Adapters(2, 1, columns=V, ranks=[1]),
        ],
    ),
    "a scale for each slot": Case(
        (3, 4, 7),
        15,
        [
            Adapters(4, 3, [2, 0, -1], Q, ranks=[3, 1, 0], scales=[0.5, -2.0, 3.0]),
            Adapters(3, 3, None, Q, scales=[2.0, 0.0, 1.5]),
            Adapters(2, 1, columns=V, scales=[4.0]),
        ],
    ),
    "a scale for the only adapter": Case((4, 7), 5, [Adapters(3, scales=[0.25]), Adapters(2, ranks=[1], scales=[3.0])]),
    "a rank for the only adapter": Case((4, 7), 5, [Adapters(3, ranks=[2]), Adapters(2, ranks=[0]), Adapters(1)]),
    "nothing but empty tables": Case((4, 7), 5, [Adapters(2, 0)]),
}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor | None, list[Tier]]:
    """x, weight, bias and tiers; x, A and B require grad."""
    x, weight = random(*case.shape, seed=1).to(dtype), random(case.out, case.shape[-1], seed=2).to(dtype)
    bias = random(case.out, seed=3).to(dtype) if case.bias else None
    tiers = []
    for index, tier in enumerate(case.tiers):
        A = random(tier.slots, tier.rank, case.shape[-1], seed=10 + index).to(dtype).requires_grad_()
        width = tier.columns[1] if tier.columns else case.out
        B = random(tier.slots, width, tier.rank, seed=20 + index).to(dtype).requires_grad_()
        slot = None if tier.slot is None else torch.tensor(tier.slot, dtype=torch.int32)
        ranks = None if tier.ranks is None else torch.tensor(tier.ranks, dtype=torch.int32)
        scales = None if tier.scales is None else torch.tensor(tier.scales, dtype=torch.float32)
        tiers.append(Tier(A, B, 0.5 + index, slot, tier.columns, ranks=ranks, slot_scales=scales))
    return x.requires_grad_(), weight, bias, tiers


def dense(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier]) -> Tensor:
    """The same group by group and tier by tier, with full matrices W + Σ scale B A in fp64."""
    grouped = any(len(tier.A) and (tier.slot is not None or len(tier.A) > 1) for tier in tiers)
    outputs = []
    for group, rows in enumerate(x.double() if grouped else [x.double()]):
        matrix = weight.double()
        for tier in tiers:
            slots = [0] * (group + 1) if len(tier.A) == 1 else list(range(len(tier.A)))
            slot = (
                slots[group] if tier.slot is None and slots else int(tier.slot[group]) if tier.slot is not None else -1
            )
            if slot >= 0 and len(tier.A):
                start, width = tier.columns or (0, len(weight))
                pick = torch.eye(len(weight), dtype=torch.float64)[:, start : start + width]
                rank = tier.rank if tier.ranks is None else int(tier.ranks[slot])
                product = tier.B[slot, :, :rank].double() @ tier.A[slot, :rank].double()
                scale = tier.scale * (1.0 if tier.slot_scales is None else float(tier.slot_scales[slot]))
                matrix = matrix + scale * pick @ product
        y = rows @ matrix.T
        outputs.append(y if bias is None else y + bias.double())
    return torch.stack(outputs) if grouped else outputs[0]


def gradients(y: Tensor, x: Tensor, tiers: Sequence[Tier]) -> list[Tensor]:
    """Of x and each A and B for a random direction; zeros where there is no dependence."""
    leaves = [x, *(factor for tier in tiers for factor in (tier.A, tier.B))]
    direction = random(*y.shape, seed=4).to(y)
    found = torch.autograd.grad((y * direction).sum(), leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]


def moved(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: list[Tier]
) -> tuple[Tensor, Tensor, Tensor | None, list[Tier]]:
    """The same on the GPU, if there is one."""
    own = [
        tier._replace(
            A=tier.A.detach().to(DEVICE).requires_grad_(tier.A.requires_grad),
            B=tier.B.detach().to(DEVICE).requires_grad_(tier.B.requires_grad),
            slot=None if tier.slot is None else tier.slot.to(DEVICE),
            ranks=None if tier.ranks is None else tier.ranks.to(DEVICE),
            slot_scales=None if tier.slot_scales is None else tier.slot_scales.to(DEVICE),
        )
        for tier in tiers
    ]
    return (
        x.detach().to(DEVICE).requires_grad_(x.requires_grad),
        weight.to(DEVICE),
        None if bias is None else bias.to(DEVICE),
        own,
    )


def error(got: Tensor, want: Tensor) -> float:
    """Relative, by norm; NaN and infinity are worse than any number."""
    got, want = got.detach().cpu().double(), want.detach().double()
    scale = want.norm()
    difference = float((got - want).norm() / scale if scale > 0 else got.norm())
    return difference if difference == difference else float("inf")
