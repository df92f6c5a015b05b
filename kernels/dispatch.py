"""Which implementation serves which tensors, in one place. The environment variable `HILORA_BACKEND` forces one:

- `reference`: the specification in plain PyTorch. It serves whatever the others do not do, also where one is forced.
- `eager`: plain PyTorch with gradients in closed form.
- `fused`, `split`: Triton, with one plan or the other for the linear layer (see `tiled`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from . import eager, reference
from .tier import Tier, check
from .torch_internals import Scoped, autocast_dtype, in_transform, without_autocast

BACKENDS = ("reference", "eager", "fused", "split")
FORCED = os.environ.get("HILORA_BACKEND") or None
if FORCED not in (None, *BACKENDS):
    raise ValueError(f"HILORA_BACKEND={FORCED!r}: expected one of {', '.join(BACKENDS)}, or nothing")

HAS_TRITON = find_spec("triton") is not None and torch.version.hip is None
# FLOP per element of x and y from which on the base product is bound by arithmetic (H100: 790 TFLOP/s, 3.35 TB/s, two
# bytes an element). There cuBLAS is reported ahead of Triton's products by more than the pass over y that "split" adds;
# below, both are bound by memory and "fused" saves that pass. Reasoned from published figures, not measured yet.
ARITHMETIC_BOUND = 470
MAX_RANK = 64  # of penalties and distances: their Gram matrices stay in registers


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    check(x, weight, bias, tiers)
    tiers = [tier for tier in tiers if tier.A.numel()]
    backend = _linear_backend(x, weight, bias, tiers, dropout)
    if backend == "reference":
        return reference.stacked_lora_linear(x, weight, bias, tiers, dropout)
    if backend == "eager":
        return eager.stacked_lora_linear(x, weight, bias, tiers)
    from . import operators

    rows = x if any(tier.tells_groups_apart for tier in tiers) else x.reshape(1, -1, x.shape[-1])
    y: Tensor = operators.stacked_lora_linear(
        rows,
        weight,
        bias,
        [tier.A for tier in tiers],
        [tier.B for tier in tiers],
        [tier.slot for tier in tiers],
        [tier.scale for tier in tiers],
        [tier.columns[0] if tier.columns else 0 for tier in tiers],
        [tier.A.requires_grad or tier.B.requires_grad for tier in tiers],
        backend,
    )[0]
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _linear_backend(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: list[Tier], dropout: float) -> str:
    trains_base = torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad))
    kind = x.device.type
    cast_to = None if x.dtype == torch.float64 else autocast_dtype(kind)  # which leaves fp64 alone
    autocast, dtype = cast_to is not None, cast_to or x.dtype
    gained = any(tier.gain is not None for tier in tiers)
    only_plain = not tiers or gained or dropout > 0 or trains_base or not (autocast or x.dtype == weight.dtype)
    if only_plain or FORCED == "reference" or _in_transform():
        return "reference"
    rows = x.shape[1] if any(tier.tells_groups_apart for tier in tiers) else x.numel() // max(x.shape[-1], 1)
    out, width = weight.shape
    if _triton_serves(x, dtype):
        if FORCED is not None:
            return FORCED
        bound_by_memory = 2 * out * width < ARITHMETIC_BOUND * (out + width)
        return "fused" if bound_by_memory and rows >= 64 and dtype != torch.float32 else "split"
    worth_folding = FORCED == "eager" or (kind != "cuda" and rows * (out + width) >= out * width)
    return "eager" if worth_folding and dtype in (torch.float32, torch.float64) and not autocast else "reference"


def gram_penalty(active: Tensor, frozen: Sequence[Tensor], gammas: Sequence[float], per_slot: bool = False) -> Tensor:
    reference.check_penalty(active, frozen, gammas)
    differentiable = torch.is_grad_enabled() and any(B.requires_grad for B in frozen)
    empty = not frozen or not all(B.numel() for B in (active, *frozen))
    if FORCED == "reference" or empty or differentiable or _in_transform():
        return reference.gram_penalty(active, frozen, gammas, per_slot)
    if max(B.shape[3] for B in (active, *frozen)) <= MAX_RANK and _triton_serves(active, active.dtype):
        from . import operators

        penalties: Tensor = operators.gram_penalty(active, frozen, gammas)[0]
    else:
        active = reference.at_least_fp32(active)
        with without_autocast(active):
            penalties = eager.gram_penalty(active, [B.to(active.dtype) for B in frozen], gammas)
    return penalties if per_slot else penalties.sum()


def subspace_distances(U: Tensor) -> Tensor:
    narrow = U.dim() == 4 and U.dtype != torch.float64 and U.shape[3] <= MAX_RANK and U.numel()
    differentiable = torch.is_grad_enabled() and U.requires_grad
    if not narrow or differentiable or _in_transform() or not _triton_serves(U, torch.float32):
        return reference.subspace_distances(U)
    from . import operators

    distances: Tensor = operators.subspace_distances(U.float())
    return distances


for function in (stacked_lora_linear, gram_penalty, subspace_distances):
    function.__doc__ = getattr(reference, function.__name__).__doc__


def _triton_serves(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels take a tensor: on a GPU from Ampere on; on a CPU where one is forced, in the interpreter.

    Raises:
        RuntimeError: if a kernel is forced that cannot run.
    """
    if FORCED in ("reference", "eager") or dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if x.device.type == "cuda":
        capable = HAS_TRITON and torch.cuda.get_device_capability(x.device)[0] >= 8
    else:
        capable = FORCED is not None and HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
    if FORCED is not None and not capable:
        raise RuntimeError(
            f"HILORA_BACKEND={FORCED} needs triton and CUDA tensors of a GPU from Ampere on, or TRITON_INTERPRET=1; "
            f"got a tensor on {x.device}"
        )
    return capable


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside of this, gradients can be differentiated once more: the reference serves."""
    with _TWICE.set(True):
        yield


_TWICE = Scoped("twice_differentiable", False)


def _in_transform() -> bool:
    """Whether torch.func differentiates or maps, or gradients are differentiated: only the reference can be."""
    return _TWICE.get() or in_transform()
