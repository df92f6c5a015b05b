"""What of torch is private, or not traced by every version's torch.compile: here, and nowhere else in the kernels.

Tried on torch 2.11 and 2.14; `tests/kernels/test_torch_internals.py` says what each must do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

T = TypeVar("T")

# Other devices ("meta") must not be asked. `is_autocast_available` itself is not traced by torch 2.11.
_DEVICES_WITH_AUTOCAST = frozenset(
    kind
    for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "xla", "ipu", "maia")
    if torch.amp.is_autocast_available(kind)
)
_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
_TRACES_CONTEXT_VARIABLES = _VERSION >= (2, 14)  # torch 2.11 does not


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast casts to on devices of a kind, e.g. "cuda"; None where it is off."""
    on = kind in _DEVICES_WITH_AUTOCAST and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if on else None


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Inside of this, operations on the device of x are not cast."""
    kind = x.device.type
    return nullcontext() if autocast_dtype(kind) is None else torch.autocast(kind, enabled=False)


def in_transform() -> bool:
    """Whether `torch.func` differentiates or maps what is called, or forward-mode differentiation does."""
    forward_mode = not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0
    return forward_mode or bool(torch._C._are_functorch_transforms_active())


def exporting() -> bool:
    """Whether a program is being written down: by torch.export, torch.jit.trace or an exporter of ONNX."""
    if torch.compiler.is_compiling():
        return torch.compiler._is_exporting_flag  # torch.compile of torch 2.11 takes `is_exporting()` for True
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def foreign(tensor: Tensor) -> bool:
    """Whether a tensor is of a library's own class, such as a quantised one."""
    kind = type(tensor)
    if kind in _PLAIN or torch.compiler.is_compiling():
        return kind not in _PLAIN
    return not kind.__module__.startswith(("torch.", "torch._"))


def float8_product(
    x: Tensor, of_x: Tensor, weight: Tensor, of_weight: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """`x weightᵀ + bias` by cuBLAS, of e4m3 `[M, in]` and `[out, in]` with a scale for each row; None where the GPU, or
    cuBLAS for these sizes, has no such product."""
    tiles = x.device.type == "cuda" and len(x) and not any(size % 16 for size in weight.shape)
    if not tiles or torch.cuda.get_device_capability(x.device) < (8, 9):
        return None
    # Scales of rows come with results in bf16 alone.
    y: Tensor = torch._scaled_mm(x, weight.T, of_x.unsqueeze(1), of_weight.unsqueeze(0), out_dtype=torch.bfloat16)
    return y.to(dtype) if bias is None else (y + bias).to(dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weightᵀ + bias` without gradients, x `[..., in]`. On a CPU oneDNN adds the bias within the product, where
    `F.linear` writes it to y beforehand, and in fp32 may be quicker than MKL; with few rows of fp32 it is not."""
    least = _LEAST_ROWS.get(x.dtype, math.inf)
    enough = x.is_cpu and x.numel() >= least * x.shape[-1] > 0
    if enough and not observed(x, weight) and torch._C._get_mkldnn_enabled():
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


def linear_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy weight`, the gradient of `linear`'s x: in fp32 by the same product, unless it is differentiated in turn."""
    plain = torch.is_grad_enabled() or dy.dtype != torch.float32 or weight.dim() != 2
    return dy @ weight if plain else linear(dy, weight.mT, None)


def _least_rows() -> dict[torch.dtype, int]:
    """From which on oneDNN is taken, where torch has it."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return {}
    return {torch.float32: 384} | ({torch.bfloat16: 1} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {})


_LEAST_ROWS = _least_rows()


def observed(*tensors: Tensor) -> bool:
    """Whether something looks at each operator that is called: a tracer, a dispatch mode, or a tensor's own class."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or any(type(tensor) not in _PLAIN for tensor in tensors)
    )


_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Scoped(Generic[T]):
    """A value for the time of a `with` block, in its own thread and task alone.

    torch.compile reads it, too, and compiles anew for another value. Where its version cannot trace context variables,
    it reads what was set last in the process.
    """

    def __init__(self, name: str, default: T) -> None:
        self._own: ContextVar[T] = ContextVar(name, default=default)
        self._last = default

    def get(self) -> T:
        if torch.compiler.is_compiling() and not _TRACES_CONTEXT_VARIABLES:
            return self._last
        return self._own.get()

    @contextmanager
    def set(self, value: T) -> Iterator[None]:
        token, before = self._own.set(value), self._last
        self._last = value
        try:
            yield
        finally:
            self._own.reset(token)
            self._last = before


def softmax_gradient(upstream: Tensor, result: Tensor) -> Tensor:
    """The gradient of what went into `result = softmax(…, -1)`, in one pass."""
    found: Tensor = torch.ops.aten._softmax_backward_data(upstream, result, -1, result.dtype)
    return found
