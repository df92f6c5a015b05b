"""`pytest tests/kernels/emulator/float8_kernels.py --emulate sm_90`: kernels beside a base of 8 bits, compiled."""

from __future__ import annotations

import pytest
import torch

from hilora.kernels import float8_lora_linear, launch, quantized, use_backend
from tests.kernels.cases import Adapters, Case, error, gradients, make

CASES = {
    "clients with slots, odd widths, several tiles": Case(
        (2, 70, 136), 408, [Adapters(rank, 3, [2, 0], (start, 136)) for start in (0, 272) for rank in (8, 8, 8)]
    ),
    "mixed ranks, some beyond their slot's": Case(
        (2, 33, 72), 72, [Adapters(64), Adapters(33, 2, [1, -1]), Adapters(5, 2, [0, 1], ranks=[3, 0])], bias=False
    ),
    "the largest tile": Case((1, 130, 128), 256, [Adapters(8), Adapters(16, columns=(64, 128))]),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_and_every_gradient(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names, rounded = [], []
    launcher = launch.launcher

    def noting(kernel, grid, args, constants) -> None:
        launcher(kernel, grid, args, constants)
        names.append(kernel.__name__)
        if names[-1] == "shrink_quantize":
            rounded.extend(args[3:5])

    monkeypatch.setattr(launch, "launcher", noting)
    x, weight, bias, tiers = make(CASES[name], torch.bfloat16)
    base = quantized(weight)
    with torch.no_grad():
        x[0, 3] = 0
        x[0, 4] *= 1e-4
    with use_backend("fused"):
        y = float8_lora_linear(x, *base, bias, tiers)
    values, of_rows = quantized(x.detach())
    assert torch.equal(rounded[0].view(torch.uint8), values.view(torch.uint8))
    assert torch.equal(rounded[1], of_rows.flatten())
    want = float8_lora_linear(x, *base, bias, tiers)
    assert error(y, want) < 4e-3
    assert names[:3] == ["pack", "shrink_quantize", "gemm"]
    for got, expected in zip(gradients(y, x, tiers), gradients(want, x, tiers), strict=True):
        assert error(got, expected) < 1e-2


def test_rows_that_are_not_finite_are_nan() -> None:
    x, weight, bias, tiers = make(CASES["the largest tile"], torch.bfloat16)
    with torch.no_grad():
        x[0, 5, 7], x[0, 6, 100] = torch.nan, -torch.inf
    with use_backend("fused"):
        y = float8_lora_linear(x, *quantized(weight), bias, tiers)
    wrong = y[0].isnan()
    assert wrong[5:7].all()
    assert wrong.sum() == 2 * 256
