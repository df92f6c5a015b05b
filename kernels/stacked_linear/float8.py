"""The stacked linear layer beside a frozen weight of 8 bits: e4m3 values, and a scale for each row of the weight.

Each call rounds the rows of x likewise; the adapters see x as it is. Scales are powers of two, so that e4m3 times scale
is exact in bf16 and fp32, on every device, and a product of such matrices in PyTorch is what tensor cores of 8 bits
compute, but for the rounding of sums. Gradients pass the rounding of x as if it were not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import Implementation, Operation
from ..errors import InvalidValueError
from ..torch_internals import autocast_dtype, float8_product, in_transform, observed, without_autocast
from . import explained, reference
from .rounding import E4M3, FLOAT8, dequantized, quantized
from .tier import Tier, check


def float8_lora_linear(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float = 0.0
) -> Tensor:
    """`stacked_lora_linear` beside a frozen weight of 8 bits, with the rows of x rounded to 8 bits for its product.

    Args:
        x: `[G, M, in]`, or `[..., in]` where no tier tells groups apart.
        weight: `[out, in]` in float8_e4m3fn, as `quantized` gives it.
        scale: fp32 `[out]`.
        bias: `[out]` or None.
        tiers: adapters in any number and of any ranks.
        dropout: probability of dropping an element of the x that the adapters see.

    Returns:
        `[..., out]` in the dtype of x, or of autocast. A row of x that is not finite gives NaN.

    Raises:
        InvalidValueError: if shapes or dtypes do not fit together.
        IndexError: if a slot lies outside of its table, on a CPU.
    """
    return OPERATION(x, weight, scale, bias, tiers, dropout)


class _Product(torch.autograd.Function):
    """`x Wᵀ + bias` in 8 bits. What is saved is the weight in 8 bits, and nothing of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        values, of_rows = quantized(x.reshape(-1, x.shape[-1]))
        with without_autocast(x):
            y = float8_product(values, of_rows, weight, scale, bias, dtype)
            if y is None:
                wide = torch.promote_types(dtype, torch.float32)
                rounded = None if bias is None else bias.to(wide)
                y = F.linear(dequantized(values, of_rows, wide), dequantized(weight, scale, wide), rounded).to(dtype)
        return y.reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, scale, bias, ctx.dtype = inputs
        ctx.save_for_backward(weight, scale)
        ctx.save_for_forward(weight, scale)
        ctx.of_x, ctx.of_bias = x.dtype, None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale = ctx.saved_tensors
        dx = (dy @ dequantized(weight, scale, dy.dtype)).to(ctx.of_x)
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.of_bias) if ctx.needs_input_grad[3] else None
        return dx, None, None, dbias, None


class _BothModes(_Product):
    """The same with forward mode, which torch.compile does not trace."""

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, _weight: None, _scale: None, dbias: Tensor | None, _dtype: None) -> Tensor:
        weight, scale = ctx.saved_tensors
        dy = dx.to(ctx.dtype) @ dequantized(weight, scale, ctx.dtype).mT
        return dy if dbias is None else dy + dbias.to(ctx.dtype)


def _reference(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float
) -> Tensor:
    product = _BothModes if in_transform() and not torch.compiler.is_compiling() else _Product
    y: Tensor = product.apply(x, weight, scale, bias, _dtype(x))
    return reference.plus_tiers(y, x, tiers, dropout)


def _prepare(
    x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiers: Sequence[Tier], dropout: float
) -> tuple[Any, ...]:
    check(x, weight, bias, tiers)
    if weight.dtype != E4M3 or scale.shape != weight.shape[:1]:
        raise InvalidValueError(
            f"weight {weight.dtype} {tuple(weight.shape)} and scale {tuple(scale.shape)} do not fit: expected "
            f"float8_e4m3fn and [{len(weight)}], as hilora.kernels.quantized gives them"
        )
    if not x.is_floating_point():
        raise InvalidValueError(f"x must be of floating-point numbers, got {x.dtype}")
    return x, weight, scale, bias, [tier for tier in tiers if tier.A.numel()], dropout


def _dtype(x: Tensor, *_: object) -> torch.dtype:
    """That the result has."""
    return x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device.type) or x.dtype


def _cannot(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiers: list[Tier], dropout: float) -> str:
    """Why the reference alone takes a call."""
    if not tiers:
        return "there are no adapters"
    if dropout > 0 or any(tier.gain is not None for tier in tiers):
        return "adapters with dropout or a gain are the reference's"
    if bias is not None and bias.requires_grad:
        return "a bias in training is the reference's"
    if _dtype(x) not in (torch.bfloat16, torch.float16):
        return "beside x of more than 16 bits the reference rounds less"
    if observed(x, weight):
        return "torch.compile and dispatch modes see the reference"
    if x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) not in [
        divmod(arch, 10) for arch in FLOAT8
    ]:
        return "the kernel is for sm_89 and sm_90"
    return ""


def _fused(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, tiers: list[Tier], dropout: float) -> Tensor:
    from . import operator  # which imports Triton

    return operator.apply(x, weight, bias, tiers, "fused", scale)


OPERATION = Operation(
    float8_lora_linear, _reference, {"fused": Implementation(_fused, _cannot, because=explained.row)}, _prepare, _dtype
)
