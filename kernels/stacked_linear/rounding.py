"""Rows of 8 bits: e4m3 values, and a scale for each row, a power of two."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn  # its largest value is 448 = 1.75 · 2⁸
FLOAT8 = (89, 90)  # architectures whose kernels multiply it
_SMALLEST = 2.0**-100  # that a row's largest value counts as, at least


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[..., in]` rounded to e4m3, of the same shape, and the fp32 scale of each row, `[...]`: the smallest power
    of two that no value exceeds 448 with; NaN for rows that are not finite."""
    largest = rows.abs().amax(-1).float().clamp_min(_SMALLEST)
    mantissa, _ = torch.frexp(largest)  # in [½, 1): what it is of a power of two, and 448 is 0.875 · 512
    scale = largest / torch.where(mantissa > 0.875, 256, 512) / mantissa
    return (rows.float() / scale.unsqueeze(-1)).to(E4M3), scale


def dequantized(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values that 8 bits `[out, in]` and scales `[out]` stand for."""
    return (weight.float() * scale.float().unsqueeze(-1)).to(dtype)
