"""Who serves which tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hilora
from hilora.kernels import (
    Tier,
    backends,
    explain,
    float8_lora_linear,
    gram_penalty,
    orthonormal_basis,
    stacked_lora_linear,
    subspace_distances,
    use_backend,
)
from hilora.kernels.errors import HiLoRAError, InvalidValueError
from hilora.kernels.stacked_linear import devices
from tests.kernels.cases import CASES, dense, make, random


def backend(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, slots: int = 1, dropout: float = 0.0, tiers: int = 1
) -> str:
    out, width = weight.shape
    slot = torch.zeros(len(x), dtype=torch.int32) if slots > 1 else None
    own = [Tier(torch.empty(slots, 2, width), torch.empty(slots, out, 2), 1.0, slot) for _ in range(tiers)]
    return explain(stacked_lora_linear, x, weight, bias, own, dropout).backend


@pytest.fixture(autouse=True)
def nothing_chosen() -> Iterator[None]:
    with use_backend(None):
        yield


def test_without_a_gpu_gradients_in_closed_form_serve_all_dtypes_and_any_rows() -> None:
    many, few, weight = torch.empty(2, 50, 60), torch.empty(2, 10, 60), torch.empty(60, 60)
    for x in (many, few):
        for slots in (1, 3):
            assert backend(x, weight, slots=slots) == "folded"
            assert backend(x.double(), weight.double(), slots=slots) == "folded"
            assert backend(x.bfloat16(), weight.bfloat16(), slots=slots) == "folded"
    assert backend(many, weight.bfloat16()) == "reference", "which says what dtypes do not fit"
    with torch.autocast("cpu", torch.bfloat16):
        assert backend(many, weight) == "folded"
        assert backend(many.double(), weight.double()) == "folded", "autocast leaves fp64 alone"
        assert backend(many.double(), weight) == "reference"


def test_the_reference_serves_what_the_others_do_not() -> None:
    x, weight = torch.empty(2, 50, 60), torch.empty(60, 60)
    assert backend(x, weight, dropout=0.1) == "reference"
    assert backend(x, weight, tiers=0) == "reference"
    assert backend(x, weight.requires_grad_()) == "reference", "a base in training"
    with torch.no_grad():
        assert backend(x, weight) == "folded"
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
    monkeypatch.setattr(backends, "_kernels_cannot", lambda x, dtype, chosen: "")
    monkeypatch.setattr(devices, "architecture", lambda: 80)
    x, weight = (
        torch.empty(1, rows, width, dtype=dtype, device="meta"),
        torch.empty(3 * width, width, dtype=dtype, device="meta"),
    )
    assert backend(x, weight) == expected
    with use_backend("fused"):
        assert backend(x, weight) == "fused"


def test_a_kernel_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight, bias, tiers = make(CASES["one tier"], torch.float32)
    with use_backend("split"), pytest.raises(RuntimeError, match="split was chosen, by use_backend or HILORA_BACKEND"):
        stacked_lora_linear(x, weight, bias, tiers)
    with use_backend("fused"), pytest.raises(HiLoRAError, match="got a tensor on cpu: it needs"):
        subspace_distances(random(2, 1, 7, 2).float())


def test_what_a_chosen_backend_does_not_do_is_the_references() -> None:
    x, weight, bias, tiers = make(CASES["one tier"], torch.bfloat16)
    with use_backend("folded"):
        assert explain(stacked_lora_linear, x, weight, bias, tiers, 0.5).backend == "reference"
        assert explain(subspace_distances, random(2, 1, 7, 2)).backend == "reference"
    with use_backend("fused"):
        assert explain(stacked_lora_linear, x.double(), weight.double(), bias, []).backend == "reference"


def test_who_serves_is_explained() -> None:
    x, weight = torch.empty(2, 50, 60), torch.empty(60, 60)
    tiers = [Tier(torch.empty(1, 2, 60), torch.empty(1, 60, 2), 1.0)]
    found = explain(stacked_lora_linear, x, weight, bias=None, tiers=tiers)
    assert found.backend == "folded"
    assert list(found.others) == ["fused", "split", "reference"]
    assert str(found).splitlines() == [
        "stacked_lora_linear: folded serves",
        "  not fused: got a tensor on cpu",
        "  not split: got a tensor on cpu",
        "  not reference: folded is preferred",
    ]
    with use_backend("reference"):
        assert explain(stacked_lora_linear, x, weight, None, tiers).others["folded"] == "reference is chosen"
    with hilora.kernels.twice_differentiable():
        found = explain(gram_penalty, random(1, 1, 7, 2), [random(1, 1, 7, 2)], [1.0])
    assert found.backend == "reference"
    assert all("gradients of gradients" in why for why in found.others.values())
    assert explain(orthonormal_basis, random(7, 2)).others["folded"] == "there is no such implementation"
    with pytest.raises(ValueError, match=r"is not an operation: expected one of .*stacked_lora_linear"):
        explain(torch.add, x, x)
    with pytest.raises(ValueError, match="do not fit"):
        explain(stacked_lora_linear, x, weight.T[:5], None, tiers)


def test_beside_8_bits_tiles_are_explained_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_kernels_cannot", lambda x, dtype, chosen: "")
    monkeypatch.setattr(devices, "architecture", lambda: 90)
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((2, 50, 64), (64, 64)))
    tiers = [Tier(torch.empty(1, 2, 64), torch.empty(1, 64, 2), 1.0)]
    narrow = weight.to(torch.float8_e4m3fn), torch.empty(64, device="meta")
    with use_backend("fused"):
        found = explain(float8_lora_linear, x, *narrow, None, tiers)
        assert found.backend == "fused"
        row = devices.device(x.device)
        assert found.because == f"by the row {row.name} of devices.json, {row.source}"


def test_every_operation_explains_itself_as_it_serves() -> None:
    assert set(backends.operations()) == {
        "stacked_lora_linear",
        "float8_lora_linear",
        "gram_penalty",
        "orthonormal_basis",
        "subspace_distances",
    }
    for operation in backends.operations().values():
        assert operation.function.__doc__
        assert set(operation.implementations) <= set(backends.BACKENDS)


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(InvalidValueError, match="there is no 'eager': expected one of fused, split"):
        use_backend("eager")


NEW = '''
from hilora.kernels.backends import Implementation, Operation
from . import reference

def double(x):
    """Twice x."""
    return OPERATIONS[0](x)

def _wide(x):
    return "" if x.shape[0] > 3 else "too narrow"

def _kernel(x):
    from . import plan
    return plan.double(x)

OTHERS = {"fused": Implementation(_kernel), "folded": Implementation(lambda x: x + x, _wide)}
OPERATIONS = (Operation(double, reference.double, OTHERS),)
'''
PLAN = """
import torch, triton, triton.language as tl
from hilora.kernels.launch import Constants, launch

@triton.jit
def double_kernel(x, y, N: tl.constexpr):
    n = tl.arange(0, N)
    tl.store(y + n, 2 * tl.load(x + n))

def double(x):
    y = torch.empty_like(x)
    launch(double_kernel, (1,), x, y, constants=Constants(N=x.shape[0]))
    return y

def cases(dtype):
    yield "sixteen", lambda: double(torch.empty(16, dtype=dtype, device="meta"))
"""


def test_a_new_operation_is_one_new_folder(tmp_path: Path) -> None:
    folder = tmp_path / "doubling"
    folder.mkdir()
    (folder / "__init__.py").write_text(NEW)
    (folder / "reference.py").write_text("def double(x):\n    return 2 * x\n")
    (folder / "plan.py").write_text(PLAN)
    beside = f"import hilora.kernels; hilora.kernels.__path__.append({str(tmp_path)!r}); "
    code = """
import torch
from hilora.kernels import explain, use_backend
from hilora.kernels.doubling import double
print(explain(double, torch.ones(2)).others["folded"], explain(double, torch.ones(4)).backend)
with use_backend("fused"):
    print(explain(double, torch.ones(4)).backend, double(torch.ones(4)).tolist())
"""
    done = python(beside + code, HILORA_BACKEND="", TRITON_INTERPRET="1")
    assert done.stdout.splitlines() == ["too narrow folded", "fused [2.0, 2.0, 2.0, 2.0]"], done.stderr
    code = """
from hilora.kernels import precompile
others = [plan for plan in precompile.plans() if "doubling" not in plan.__name__]
for plan in others:
    plan.cases = lambda dtype: []
print(len(others), {(row.kernel, row.case) for row in precompile.compile_all(90)})
"""
    done = python(beside + code, TRITON_INTERPRET="0")
    assert done.stdout == "2 {('double_kernel', 'sixteen')}\n", done.stderr


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)


def test_the_environment_chooses_a_backend() -> None:
    code = "from hilora.kernels.backends import chosen_backend; print(chosen_backend())"
    assert python(code, HILORA_BACKEND="reference").stdout == "reference\n"
    assert python(code, HILORA_BACKEND="").stdout == "None\n"
    for name in ("cuda", "eager"):
        wrong = python("import hilora.kernels.backends", HILORA_BACKEND=name)
        assert f"HILORA_BACKEND={name!r}: expected one of fused, split, folded, reference, or nothing" in wrong.stderr


def test_importing_hilora_does_not_import_triton() -> None:
    assert python("import hilora, sys; print('triton' in sys.modules)", HILORA_BACKEND="").stdout == "False\n"
