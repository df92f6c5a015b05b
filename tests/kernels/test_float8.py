"""The stacked linear layer beside a weight of 8 bits: against dequantised arithmetic in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from hilora.kernels import Tier, dequantized, explain, float8_lora_linear, quantized, twice_differentiable, use_backend
from hilora.kernels.stacked_linear.rounding import FLOAT8
from tests.kernels.cases import CASES, Case, dense, error, gradients, make, moved, random

E4M3 = torch.float8_e4m3fn
EPSILON = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def narrow(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A weight in 8 bits, its scales, and what these stand for, in fp64."""
    values, scale = quantized(weight)
    return values, scale, values.double() * scale.double()[:, None]


def rounded(x: Tensor) -> Tensor:
    values, scale = quantized(x.detach())
    return values.double() * scale.double().unsqueeze(-1)


@pytest.mark.parametrize("largest", [1e-20, 0.3, 1.0, 1.75, 1.7500001, 448.0, 449.0, 3e38])
def test_scales_are_the_smallest_powers_of_two(largest: float) -> None:
    row = torch.tensor([[largest, -largest / 3, largest / 1000]])
    values, scale = quantized(row)
    assert values.dtype == E4M3
    assert scale.shape == (1,)
    assert torch.frexp(scale)[0] == 0.5
    assert largest <= 448 * scale.double()
    assert largest > 224 * scale.double()
    exact = (row.double() / scale.double()).abs()
    spacing = 2.0 ** (exact.log2().floor().clamp_min(-6) - 3)
    assert ((values.double().abs() - exact).abs() <= spacing / 2).all()


def test_rows_are_scaled_apart_and_leading_dimensions_kept() -> None:
    x = random(2, 3, 7) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    values, scale = quantized(x)
    assert values.shape == (2, 3, 7)
    assert scale.shape == (2, 3)
    for group in range(2):
        for row in range(3):
            alone = quantized(x[group, row])
            assert torch.equal(alone[0].float(), values[group, row].float())
            assert alone[1] == scale[group, row]


def test_what_8_bits_stand_for_is_exact_in_16_bits_and_rounds_by_at_most_a_16th() -> None:
    weight = random(64, 48, dtype=torch.float32)
    values, scale = quantized(weight)
    wide, bf16 = (dequantized(values, scale, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert torch.equal(wide, bf16.float())
    assert ((wide - weight).abs() <= weight.abs() / 16 + scale[:, None] * 2**-10).all()
    again = quantized(bf16)
    assert torch.equal(dequantized(*again, torch.float32), wide)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_and_backward(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, tiers = make(CASES[name], dtype)
    values, scale, wide = narrow(weight)
    y = float8_lora_linear(x, values, scale, bias, tiers)
    assert y.dtype == dtype
    product = rounded(x) @ wide.T + (0 if bias is None else bias.double())
    low_rank = dense(x, torch.zeros_like(wide), None, tiers)
    assert y.shape == low_rank.shape
    assert error(y, product + low_rank) < EPSILON[dtype]
    expected = dense(x, wide, bias, tiers)  # gradients pass the rounding of x
    for got, want in zip(gradients(y, x, tiers), gradients(expected, x, tiers), strict=True):
        assert error(got, want) < EPSILON[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_zeros_and_rows_that_are_not_finite(dtype: torch.dtype) -> None:
    values, scale, _ = narrow(random(5, 7, dtype=torch.float32))
    bias = random(5, seed=3, dtype=dtype)
    x = random(4, 7, dtype=dtype)
    x[0], x[1, 2], x[2, 3] = 0, torch.nan, torch.inf
    y = float8_lora_linear(x, values, scale, bias, [])
    assert torch.equal(y[0], bias)
    assert y[1:3].isnan().all()
    assert y[3].isfinite().all()
    weight = random(5, 7, dtype=torch.float32)
    weight[0], weight[1, 0] = 0, torch.nan
    y = float8_lora_linear(x[3:], *quantized(weight), None, [])
    assert y[0, 0] == 0
    assert y[0, 1].isnan()
    assert y[0, 2:].isfinite().all()


SERVED = ("q and v of qkv", "slots that repeat or are none", "a rank for each slot", "one row", "no rows")


@pytest.mark.parametrize("name", SERVED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_agree_with_the_reference(name: str, dtype: torch.dtype) -> None:
    """In Triton's interpreter where there is no GPU."""
    launch = pytest.importorskip("hilora.kernels.launch")
    if launch.architecture() not in (0, *FLOAT8):
        pytest.skip("this GPU does not multiply 8 bits")
    x, weight, bias, tiers = moved(*make(CASES[name], dtype))
    values, scale = quantized(weight)
    want = float8_lora_linear(x, values, scale, bias, tiers)
    with use_backend("fused"):
        assert explain(float8_lora_linear, x, values, scale, bias, tiers).backend == "fused"
        y = float8_lora_linear(x, values, scale, bias, tiers)
    assert y.dtype == dtype
    assert error(y, want.cpu()) < EPSILON[dtype]
    for got, expected in zip(gradients(y, x, tiers), gradients(want, x, tiers), strict=True):
        assert error(got, expected.cpu()) < EPSILON[dtype]


def test_under_autocast_x_is_rounded_once() -> None:
    values, scale, wide = narrow(random(5, 7, dtype=torch.float32))
    x = random(4, 7, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = float8_lora_linear(x, values, scale, None, [Tier(torch.ones(1, 2, 7), torch.zeros(1, 5, 2), 1.0)])
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, (rounded(x) @ wide.T).float().bfloat16())
    (gradient,) = torch.autograd.grad(y.float().sum(), x)
    assert gradient.dtype == torch.float32


def test_nothing_of_x_is_saved_for_backward() -> None:
    values, scale, _ = narrow(random(5, 7, dtype=torch.float32))
    saved: list[Tensor] = []
    x = random(4, 7, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        float8_lora_linear(x, values, scale, None, [])
    assert {tensor.dtype for tensor in saved} == {E4M3, torch.float32}
    assert sum(tensor.numel() * tensor.itemsize for tensor in saved) == values.numel() + 4 * len(scale)


def test_gradients_of_gradients_and_torch_func() -> None:
    case = Case((4, 7), 5, [])
    x, weight, bias, _ = make(case)
    values, scale, wide = narrow(weight)
    A, B = random(1, 2, 7).requires_grad_(), random(1, 5, 2, seed=5).requires_grad_()

    def loss(x: Tensor, product: Any) -> Tensor:
        found: Tensor = (product(x) ** 2).sum()
        return found

    def ours(x: Tensor) -> Tensor:
        return float8_lora_linear(x, values, scale, bias, [Tier(A, B, 2.0)])

    def through(x: Tensor) -> Tensor:
        """The same, with a rounding that gradients pass."""
        assert bias is not None
        x8 = x + (rounded(x) - x).detach()
        return x8 @ wide.T + bias + 2 * x @ A[0].T @ B[0].T

    def second(product: Any) -> list[Tensor]:
        (first,) = torch.autograd.grad(loss(x, product), x, create_graph=True)
        return list(torch.autograd.grad((first**2).sum(), [x, A, B]))

    with twice_differentiable():
        for got, want in zip(second(ours), second(through), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)
    plain = x.detach()
    torch.testing.assert_close(torch.func.vmap(ours)(plain), ours(plain))
    torch.testing.assert_close(
        torch.func.grad(lambda x: loss(x, ours))(plain), torch.autograd.grad(loss(x, ours), x)[0]
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_forward_mode(dtype: torch.dtype) -> None:
    x, weight, bias, tiers = make(CASES["one tier"], dtype)
    assert bias is not None
    values, scale, wide = narrow(weight)
    x, bias = x.detach(), bias.detach()
    dx, dbias = random(*x.shape, seed=8, dtype=dtype), random(5, seed=9, dtype=dtype)
    frozen = [tier._replace(A=tier.A.detach(), B=tier.B.detach()) for tier in tiers]

    def ours(x: Tensor, bias: Tensor) -> Tensor:
        return float8_lora_linear(x, values, scale, bias, frozen)

    of_x = dense(dx, wide, None, frozen)
    for of_bias, expected in ((dbias, of_x + dbias.double()), (torch.zeros_like(bias), of_x)):
        y, dy = torch.func.jvp(ours, (x, bias), (dx, of_bias))[:2]
        assert dy.dtype == dtype
        assert torch.equal(y, ours(x, bias))
        assert error(dy, expected) < EPSILON[dtype]
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(ours(forward_ad.make_dual(x, dx), bias)).tangent
        assert tangent is not None
        assert error(tangent, of_x) < EPSILON[dtype]
    for got, reverse in zip(
        torch.func.jacfwd(ours, (0, 1))(x, bias), torch.func.jacrev(ours, (0, 1))(x, bias), strict=True
    ):
        assert error(got, reverse.double()) < EPSILON[dtype]


def test_a_bias_in_training_has_its_gradient() -> None:
    x, weight, bias, tiers = make(CASES["one tier"])
    assert bias is not None
    values, scale, _ = narrow(weight)
    bias.requires_grad_()
    (got,) = torch.autograd.grad(float8_lora_linear(x, values, scale, bias, tiers).sin().sum(), bias)
    y = float8_lora_linear(x, values, scale, bias, tiers).detach()
    torch.testing.assert_close(got, y.cos().flatten(0, -2).sum(0))


def test_it_compiles_in_one_graph() -> None:
    x, weight, bias, tiers = make(CASES["q and v of qkv"], torch.float32)
    values, scale, _ = narrow(weight)

    def layer(x: Tensor) -> Tensor:
        return float8_lora_linear(x, values, scale, bias, tiers)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    for got, want in zip(gradients(compiled(x), x, tiers), gradients(layer(x), x, tiers), strict=True):
        torch.testing.assert_close(got, want)


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias, tiers = make(CASES["one tier"], torch.float32)
    values, scale, _ = narrow(weight)
    for wrong in ((weight, scale), (values, scale[1:]), (values.to(torch.float8_e5m2), scale)):
        with pytest.raises(ValueError, match="expected float8_e4m3fn and \\[5\\]"):
            float8_lora_linear(x, *wrong, bias, tiers)
    with pytest.raises(ValueError, match="floating-point"):
        float8_lora_linear(torch.ones(4, 7, dtype=torch.int32), values, scale, bias, [])
    with pytest.raises(ValueError, match="do not fit"):
        float8_lora_linear(x[:, 1:], values, scale, bias, tiers)
    found = explain(float8_lora_linear, x, values, scale, bias, tiers)
    assert found.backend == "reference"
    assert "rounds less" in found.others["fused"]
    assert "there are no adapters" in explain(float8_lora_linear, x, values, scale, bias, []).others["fused"]
