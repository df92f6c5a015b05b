"""`pytest tests/kernels/emulator/broken_kernels.py --emulate sm_90`: the project's kernels, made wrong, are found out.

`tests/kernels/test_emulated.py` starts it.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from hilora.kernels import launch
from hilora.kernels.emulator import launching
from hilora.kernels.emulator.errors import Fault
from hilora.kernels.emulator.launching import RaceError
from hilora.kernels.stacked_linear import plan
from hilora.kernels.stacked_linear import triton as kernels
from tests.kernels.cases import Adapters, Case, make

CASE = Case((1, 70, 192), 192, [Adapters(64), Adapters(40)])


def step(dtype: torch.dtype, how: str = "split", case: Case = CASE, trained: tuple[bool, ...] = (True, False)) -> None:
    """Forward and backward."""
    x, weight, bias, tiers = make(case, dtype)
    with torch.no_grad():
        y, *inner = plan.forward(x, weight, bias, tiers, trained, how)
        plan.backward(y, inner, x, weight, tiers, trained, how, needs_x=True)


def broken(
    kernel: str, statements: list[str], how: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, tuple[bool, list[bool]]]:
    """By statement: whether a bf16 kernel without any of them has a race, and without each single one."""
    found: dict[str, tuple[bool, list[bool]]] = {}
    execute = launching.execute

    def races(ptx: str, rest: tuple[Any, ...]) -> bool:
        return execute(ptx, *rest).total() > 0

    def several(ptx: str, *rest: Any) -> Any:
        if not found and f".entry {kernel}(" in ptx:
            for statement in statements:
                every = re.compile(rf"\b{re.escape(statement)}[^;]*;")
                single = [races(ptx[: one.start()] + ptx[one.end() :], rest) for one in every.finditer(ptx)]
                found[statement] = races(every.sub("", ptx), rest), single
        return execute(ptx, *rest)

    monkeypatch.setattr(launching, "execute", several)
    step(torch.bfloat16, how)
    return found


@pytest.mark.parametrize(("kernel", "how"), [("gemm", "fused"), ("shrink_expand", "split"), ("backward_rows", "split")])
def test_a_statement_less_is_a_race(
    kernel: str, how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    statements = ["bar.sync", "cp.async.wait_group"]
    if request.config.getoption("--emulate") == "sm_90":
        statements += ["wgmma.wait_group", "fence.proxy.async"]
    for statement, (every, single) in broken(kernel, statements, how, monkeypatch).items():
        if statement == "fence.proxy.async":  # for what warps write, not for copies by cp.async
            assert every == (kernel == "backward_rows")
        else:
            assert every, statement
            assert any(single), statement  # but not each is needed where others follow


def edited(now: str, then: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels of the linear layer with some of their text replaced."""
    source = Path(kernels.__file__).read_text()
    assert now in source
    (folder / "edited.py").write_text(source.replace(now, then))
    spec = importlib.util.spec_from_file_location("edited", folder / "edited.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with monkeypatch.context() as here:
        here.delenv("TRITON_INTERPRET")
        spec.loader.exec_module(module)
    return module


def test_a_product_in_a_branch_taken_at_run_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it once was: Triton's pipeliner refills the operand's buffer before the branch reads it."""
    case = Case((1, 70, 192), 192, [Adapters(8) for _ in range(6)])
    trained = (False,) * 5 + (True,)
    step(torch.float32, "split", case, trained)
    then = "if (c * R < j + CHUNK) & (c * R + TRAINED > j):  # for chunks"
    old = edited("if TRAINED > 0:  # for chunks", then, tmp_path, monkeypatch)
    monkeypatch.setattr(plan, "backward_rows", old.backward_rows)
    with pytest.raises(RaceError, match=r"backward_rows.*\n.*read of a cp\.async in flight"):
        step(torch.float32, "split", case, trained)


def transposed_again(left, right, sums, parts, taken, N: tl.constexpr, BLOCK: tl.constexpr, KNOWN: tl.constexpr):
    """`sums = left right`, and the part of each step with the transposed operand, where it is taken."""
    i, j = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    other = tl.load(right + i * BLOCK + j)
    for n in range(0, N, BLOCK):
        a = tl.load(left + i * N + n + j)
        b = tl.load(right + (n + i) * BLOCK + j)
        acc = tl.dot(a, b, acc, input_precision="ieee")
        if KNOWN or taken > 5:
            part = tl.dot(tl.trans(a), other, input_precision="ieee")
            tl.store(parts + (n + i) * BLOCK + j, part)
    tl.store(sums + i * BLOCK + j, acc)


@pytest.mark.parametrize("known", [True, False])
def test_a_small_kernel_with_such_a_product(known: bool) -> None:
    block, steps = 32, 6
    left, right = torch.randn(block, steps * block), torch.randn(steps * block, block)
    sums, parts = torch.full((block, block), torch.nan), torch.full_like(right, torch.nan)
    kernel = JITFunction(transposed_again)
    constants = launch.Constants(N=steps * block, BLOCK=block, KNOWN=known, num_warps=4, num_stages=2)

    def run() -> None:
        launch.launcher(kernel, (1,), (left, right, sums, parts, 7), constants)

    if known:
        run()
        torch.testing.assert_close(sums, left @ right)
        whole = torch.cat([left[:, n : n + block].T @ right[:block] for n in range(0, steps * block, block)])
        torch.testing.assert_close(parts, whole)
    else:
        with pytest.raises(RaceError, match=r"read of a cp\.async in flight"):
            run()


def test_what_a_fault_says() -> None:
    kernel = JITFunction(transposed_again)
    short = torch.randn(32, 32)
    args = (short, torch.randn(192, 32), short.clone(), torch.randn(192, 32), 7)
    constants = launch.Constants(N=192, BLOCK=32, KNOWN=True)
    with pytest.raises(Fault, match=r"outside of all tensors: .* bytes from the start of "):
        launch.launcher(kernel, (1,), args, constants)
