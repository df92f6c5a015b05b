"""A frozen linear layer whose weight may be kept in 8 bits, with a scale for each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from hilora import kernels
from hilora.errors import InvalidTypeError

_E4M3, _NAME = torch.float8_e4m3fn, "float8_e4m3fn"
_WIDE = (torch.bfloat16, torch.float16, torch.float32, torch.float64)  # dtypes that 8 bits can stand for


class FrozenLinear(nn.Linear):
    """An `nn.Linear` that can narrow its weight.

    Attributes:
        weight: W, `[out, in]`; once narrowed, its 8 bits.
        weight_scale: fp32 `[out]`, what those of each row are multiplied by; else None.
        base_dtype: of W, before it was narrowed.
    """

    weight_scale: Tensor | None
    base_dtype: torch.dtype

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(in_features, out_features, device="meta", bias=bias)
        self.register_buffer("weight_scale", None)

    @property
    def frozen_weight(self) -> Tensor:
        """W, `[out, in]`, in the dtype in which the layer computes."""
        scale = self.weight_scale
        return self.weight if scale is None else kernels.dequantized(self.weight, scale, self.base_dtype)

    def narrow(self) -> None:
        """Keep W in 8 bits from now on. W counts to the precision of bfloat16, so that a model that was cast has the
        same 8 bits.

        Raises:
            TypeError: where W is not of floating-point numbers.
        """
        if self.weight_scale is not None:
            return
        if self.weight.dtype not in _WIDE:
            raise InvalidTypeError(f"a base in 8 bits is made of floating-point numbers, got {self.weight.dtype}")
        self.base_dtype = self.weight.dtype
        values, self.weight_scale = _quantized(self.weight.detach())
        self.weight = nn.Parameter(values, requires_grad=False)

    def product(self, x: Tensor, tiers: Sequence[kernels.Tier], dropout: float = 0.0) -> Tensor:
        """`x Wᵀ + b` and what tiers add to it."""
        scale = self.weight_scale
        if scale is None:
            return kernels.stacked_lora_linear(x, self.frozen_weight, self.bias, tiers, dropout)
        return kernels.float8_lora_linear(x, self.weight, scale, self.bias, tiers, dropout)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """To another device or dtype; 8 bits and their scales keep their dtypes."""

        def apply(tensor: Tensor) -> Tensor:
            if tensor.dtype != _E4M3 and tensor is not self.weight_scale:
                return fn(tensor)
            bits = tensor.view(torch.uint8)  # which a cast of floating-point numbers leaves alone
            moved = fn(bits)
            return (moved if moved.dtype == bits.dtype else bits.to(moved.device)).view(tensor.dtype)

        if self.weight_scale is not None:
            self.base_dtype = fn(torch.empty(0, dtype=self.base_dtype)).dtype
        super()._apply(fn if self.weight_scale is None else apply, recurse)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A weight of more bits, as of a plain model, is rounded to 8; one of 8 bits is for a narrowed layer alone."""
        weight = state_dict.get(f"{prefix}weight")
        narrowed, in_8_bits = self.weight_scale is not None, weight is not None and weight.dtype == _E4M3
        if in_8_bits and not (narrowed and f"{prefix}weight_scale" in state_dict):
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix}weight is in 8 bits, which mean nothing without their scales: "
                + ("load its weight_scale as well" if narrowed else f"make the model with base_dtype={_NAME!r}")
            )
            return
        if narrowed and weight is not None and weight.dtype in _WIDE:
            state_dict[f"{prefix}weight"], state_dict[f"{prefix}weight_scale"] = _quantized(weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[out, in]` in 8 bits, and scales `[out]`."""
    return kernels.quantized(weight if weight.dtype == torch.float16 else weight.bfloat16())
