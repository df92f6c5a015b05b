"""A frozen linear layer with stacked tiers of low-rank adapters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..backends import Implementation, Operation
from ..torch_internals import autocast_dtype, foreign
from . import explained, float8, folded, reference
from .float8 import float8_lora_linear
from .rounding import dequantized, quantized
from .tier import Tier, Tiers, check

__all__ = ["OPERATIONS", "Tier", "Tiers", "dequantized", "float8_lora_linear", "quantized", "stacked_lora_linear"]


def stacked_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """`y = x Wᵀ + b + Σ_tier scale · gain(x) · (x A[slot]ᵀ) B[slot]ᵀ`, each tier on its columns of the output.

    Args:
        x: `[G, M, in]`, or `[..., in]` where no tier tells groups apart.
        weight: `[out, in]`.
        bias: `[out]` or None.
        tiers: adapters in any number and of any ranks. Their factors may be wider than `x` (fp32 beside bf16); the
            products are taken in the dtype of the base product.
        dropout: probability of dropping an element of the x that the adapters see.

    Returns:
        `[..., out]` in the dtype of the base product.

    Raises:
        InvalidValueError: if shapes do not fit together.
        IndexError: if a slot lies outside of its table, on a CPU. On a GPU an error would have to wait for the device:
            there the outputs of that group, in the tier's columns at least, are NaN.
    """
    return OPERATIONS[0](x, weight, bias, tiers, dropout)


Call = tuple[Tensor, Tensor, Tensor | None, Sequence[Tier], float]


def _prepare(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> Call:
    if isinstance(tiers, Tiers):
        key = x.shape, weight.shape, None if bias is None else bias.shape
        all_there = tiers.recall("checked", key, _checked, x, weight, bias, tiers)
    else:
        all_there = _checked(x, weight, bias, tiers)
    return x, weight, bias, tiers if all_there else [tier for tier in tiers if tier.A.numel()], dropout


def _checked(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier]) -> bool:
    """Whether all tiers, which must fit, have an effect."""
    check(x, weight, bias, tiers)
    return all(tier.A.numel() for tier in tiers)


def _dtype(x: Tensor, *_: object) -> torch.dtype:
    """That the products are taken in."""
    return (
        x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype
    )  # autocast leaves fp64 alone


def _rows(x: Tensor, tiers: Sequence[Tier]) -> int:
    """Rows of x with the same adapters."""
    return x.shape[1] if any(tier.tells_groups_apart for tier in tiers) else x.numel() // max(x.shape[-1], 1)


def _cannot(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> str:
    """Why the reference alone takes a call."""
    if not tiers:
        return "there are no adapters"
    if dropout > 0:
        return "adapters with dropout are the reference's"
    if foreign(weight):
        return "a weight of a class of its own, such as a quantised one, is the reference's"
    if any(tier.gain is not None for tier in tiers):
        return "tiers with a gain are the reference's"
    if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return "a weight or bias in training is the reference's"
    if x.dtype != weight.dtype and (x.dtype == torch.float64 or autocast_dtype(x.device.type) is None):
        return "x and weight differ in dtype"
    return ""


def _slower_folded(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> str:
    return "it is for tensors without a GPU" if x.device.type == "cuda" else ""


def _slower_fused(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> str:
    from . import operator
    from .devices import FEW, device

    out, width = weight.shape
    if _dtype(x) == torch.float32:
        return "in fp32 the base product is cuBLAS's"
    if _rows(x, tiers) < FEW:
        return "a tile has more rows than a group"
    few_operations = 2 * out * width < device(x.device).fused_below * (out + width)
    if few_operations or operator.in_one_kernel(x, weight, tiers, _dtype(x)):
        return ""
    return "arithmetic is the limit: the base product is cuBLAS's"


def _fold(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> Tensor:
    return folded.stacked_lora_linear(x, weight, bias, tiers, _dtype(x))


def _fused(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> Tensor:
    from . import operator  # which imports Triton

    return operator.apply(x, weight, bias, tiers, "fused")


def _split(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float) -> Tensor:
    from . import operator

    return operator.apply(x, weight, bias, tiers, "split")


OPERATIONS = (
    Operation(
        stacked_lora_linear,
        reference.stacked_lora_linear,
        {
            "fused": Implementation(_fused, _cannot, _slower_fused, explained.row),
            "split": Implementation(_split, _cannot, because=explained.row),
            "folded": Implementation(_fold, _cannot, _slower_folded),
        },
        _prepare,
        _dtype,
    ),
    float8.OPERATION,
)
