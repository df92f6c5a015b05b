"""What the kernels take from torch's private parts, and read where torch.compile must be able to trace it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from itertools import product

import pytest
import torch

from hilora.kernels import dequantized, quantized
from hilora.kernels.torch_internals import (
    Scoped,
    autocast_dtype,
    exporting,
    float8_product,
    in_transform,
    linear,
    linear_gradient,
    without_autocast,
)


def test_what_autocast_casts_to() -> None:
    assert autocast_dtype("cpu") is None
    assert autocast_dtype("meta") is None
    with torch.autocast("cpu", torch.bfloat16):
        assert autocast_dtype("cpu") == torch.bfloat16
        with without_autocast(torch.empty(1)):
            assert autocast_dtype("cpu") is None
        with without_autocast(torch.empty(1, device="meta")):
            assert autocast_dtype("cpu") == torch.bfloat16


def test_transforms_are_noticed() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(in_transform())
        return x.sum()

    x = torch.ones(3)
    function(x)
    torch.func.grad(function)(x)
    torch.func.vmap(function)(x[None])
    assert seen == [False, True, True]


def test_a_program_that_is_compiled_is_not_exported() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + exporting()

    x = torch.zeros(3)
    assert torch.equal(torch.compile(Model(), fullgraph=True, backend="eager")(x), x)
    for strict in (False, True):
        assert torch.equal(torch.export.export(Model(), (x,), strict=strict).module()(x), x + 1)


def test_a_scoped_value_is_of_its_thread_and_task_alone() -> None:
    value = Scoped("test", "default")

    async def task(own: str) -> str:
        with value.set(own):
            await asyncio.sleep(0)  # the other task sets its own
            return value.get()

    async def both() -> list[str]:
        return list(await asyncio.gather(task("one"), task("two")))

    assert asyncio.run(both()) == ["one", "two"]
    seen: list[str] = []
    with value.set("here"):
        thread = threading.Thread(target=lambda: seen.append(value.get()))
        thread.start()
        thread.join()
        assert (seen, value.get()) == (["default"], "here")
    with pytest.raises(KeyError), value.set("lost"):
        raise KeyError
    assert value.get() == "default"


@pytest.mark.parametrize(
    ("function", "context"),
    [
        (lambda x: x + 1 if autocast_dtype("cpu") is None else x, lambda: torch.autocast("cpu", torch.bfloat16)),
        (lambda x: x + 1 if SCOPED.get() is None else x, lambda: SCOPED.set("fused")),
        (lambda x: x + (0 if in_transform() else 1), None),
    ],
    ids=["autocast", "scoped", "transform"],
)
def test_torch_compile_traces_it_and_sees_a_change(
    function: Callable[[torch.Tensor], torch.Tensor], context: Callable[[], object] | None
) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    x = torch.zeros(1)
    assert compiled(x) == 1
    if context is not None:
        with context():  # type: ignore[attr-defined]
            assert compiled(x) == 0
        assert compiled(x) == 1


SCOPED: Scoped[str | None] = Scoped("compiled", None)


def test_products_of_8_bits_are_the_gpus_alone() -> None:
    x, of_x = quantized(torch.randn(5, 32))
    weight, of_weight = quantized(torch.randn(16, 32))
    bias = torch.randn(16)
    assert float8_product(x, of_x, weight, of_weight, bias, torch.float32) is None
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("there is no GPU that multiplies 8 bits")
    x8, s8, w8, t8, b8 = (tensor.cuda() for tensor in (x, of_x, weight, of_weight, bias))
    found = float8_product(x8, s8, w8, t8, b8, torch.float32)
    assert found is not None
    want = dequantized(x, of_x, torch.float64) @ dequantized(weight, of_weight, torch.float64).T + bias
    torch.testing.assert_close(found.cpu().double(), want, rtol=1e-2, atol=1e-2)
    assert float8_product(x8, s8, w8[:7], t8[:7], None, torch.float32) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_product_with_bias_is_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    wide = torch.randn(48, 96, dtype=dtype)
    weights = [torch.randn(48, 32, dtype=dtype), torch.randn(32, 48, dtype=dtype).T, wide[:, 40:72]]
    rows = [torch.randn(shape, dtype=dtype) for shape in ((0, 32), (1, 32), (400, 32), (3, 150, 32), (2, 3, 50, 32))]
    rows.append(torch.randn(32, 400, dtype=dtype).T)
    off = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    for x, weight, bias in product(rows, weights, (torch.randn(48, dtype=dtype), None)):
        found = linear(x, weight, bias)
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        torch.testing.assert_close(found.double(), want, rtol=off, atol=10 * off)
        assert found.dtype == dtype
        assert found.is_contiguous(), "adapters are added in place"
        dx = linear_gradient(found, weight)
        torch.testing.assert_close(dx.double(), found.double() @ weight.double(), rtol=off, atol=100 * off)
        assert dx.is_contiguous()
