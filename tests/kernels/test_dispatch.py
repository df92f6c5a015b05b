"""Who serves which tensors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import hilora
from hilora.kernels import Tier, dispatch, stacked_lora_linear
from tests.kernels.cases import CASES, dense, make, random


def backend(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, slots: int = 1, dropout: float = 0.0, tiers: int = 1
) -> str:
    out, width = weight.shape
    slot = torch.zeros(len(x), dtype=torch.int32) if slots > 1 else None
    own = [Tier(torch.empty(slots, 2, width), torch.empty(slots, out, 2), 1.0, slot) for _ in range(tiers)]
    return dispatch._linear_backend(x, weight, bias, own, dropout)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", None)


def test_without_a_gpu_folding_serves_many_rows_in_fp32_and_fp64() -> None:
    many, few, weight = torch.empty(2, 50, 60), torch.empty(2, 10, 60), torch.empty(60, 60)
    assert backend(many, weight) == "eager"
    assert backend(many.double(), weight.double()) == "eager"
    assert backend(few, weight) == "reference", "folding costs more than it saves"
    assert backend(few, weight, slots=3) == "reference", "20 rows are 10 for each client"
    assert backend(many, weight, slots=3) == "eager"
    assert backend(many.bfloat16(), weight.bfloat16()) == "reference", "a bf16 weight would round adapters away"
    with torch.autocast("cpu", torch.bfloat16):
        assert backend(many, weight) == "reference"
        assert backend(many.double(), weight.double()) == "eager", "autocast leaves fp64 alone"


def test_the_reference_serves_what_the_others_do_not() -> None:
    x, weight = torch.empty(2, 50, 60), torch.empty(60, 60)
    assert backend(x, weight, dropout=0.1) == "reference"
    assert backend(x, weight, tiers=0) == "reference"
    assert backend(x, weight.requires_grad_()) == "reference", "a base in training"
    with torch.no_grad():
        assert backend(x, weight) == "eager"
    assert backend(x, weight.detach(), bias=torch.empty(60, requires_grad=True)) == "reference"


def test_a_base_in_training_has_its_gradient() -> None:
    x, weight, bias, tiers = make(CASES["one tier"])
    weight.requires_grad_()
    got = torch.autograd.grad(stacked_lora_linear(x, weight, bias, tiers).square().sum(), weight)
    torch.testing.assert_close(got, torch.autograd.grad(dense(x, weight, bias, tiers).square().sum(), weight))


@pytest.mark.parametrize(
    ("rows", "width", "dtype", "expected"),
    [
        (12_608, 192, torch.bfloat16, "fused"),
        (12_608, 768, torch.bfloat16, "split"),
        (12_608, 192, torch.float32, "split"),
        (37, 192, torch.bfloat16, "split"),
    ],
)
def test_the_plan_on_a_gpu(
    rows: int, width: int, dtype: torch.dtype, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_triton_serves", lambda x, dtype: True)
    x, weight = (
        torch.empty(1, rows, width, dtype=dtype, device="meta"),
        torch.empty(3 * width, width, dtype=dtype, device="meta"),
    )
    assert backend(x, weight) == expected
    monkeypatch.setattr(dispatch, "FORCED", "fused")
    assert backend(x, weight) == "fused"


def test_a_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "FORCED", "split")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias, tiers = make(CASES["one tier"], torch.float32)
    with pytest.raises(RuntimeError, match="HILORA_BACKEND=split needs triton and CUDA tensors"):
        stacked_lora_linear(x, weight, bias, tiers)
    with pytest.raises(RuntimeError, match="got a tensor on cpu"):
        hilora.kernels.subspace_distances(random(2, 1, 7, 2).float())


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)


def test_the_environment_forces_a_backend() -> None:
    said = python("from hilora.kernels import dispatch; print(dispatch.FORCED)", HILORA_BACKEND="reference")
    assert said.stdout == "reference\n"
    assert python("from hilora.kernels import dispatch; print(dispatch.FORCED)", HILORA_BACKEND="").stdout == "None\n"
    wrong = python("import hilora", HILORA_BACKEND="cuda")
    assert "HILORA_BACKEND='cuda': expected one of reference, eager, fused, split, or nothing" in wrong.stderr


def test_importing_hilora_does_not_import_triton() -> None:
    assert python("import hilora, sys; print('triton' in sys.modules)", HILORA_BACKEND="").stdout == "False\n"
