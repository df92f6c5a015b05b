"""Every kernel compiles for every architecture, without a GPU."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface

from hilora.kernels import launch, precompile
from hilora.kernels.overlaps import triton as overlaps
from hilora.kernels.stacked_linear import slots
from hilora.kernels.stacked_linear import triton as stacked_linear

pytestmark = pytest.mark.slow

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
HELPERS = {"dot", "cast"}  # of kernels, not launched themselves
FLOAT8 = {("89", "shrink_quantize"), ("90", "shrink_quantize")}
HOPPER = {"forward_tiles", "backward_tiles"}  # that sm_90 alone has


def run(*command: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, *command]
    return subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_every_kernel_compiles_without_a_spill_for_every_architecture() -> None:
    done = run("-m", "hilora.kernels.precompile")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:-1]]
    kernels = {
        name
        for module in (overlaps, slots, stacked_linear)
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface)
    }
    assert {(row[0], row[1]) for row in rows} == {
        (str(arch), name) for arch in precompile.ARCHITECTURES for name in kernels - HELPERS
    } | {("90", name) for name in HOPPER} | FLOAT8
    products = [row for row in rows if row[1] == "gemm" and "bf16" in row]
    eight = {(row[0], *row[-2:]) for row in products if "8-bit" in row}
    assert eight == {("89", "HMMA", "QMMA"), ("90", "HGMMA", "QGMMA")}  # the tiers' product is one of 16 bits
    instructions = {(row[0], row[-1]) for row in products if "8-bit" not in row}
    assert instructions == {("80", "HMMA"), ("89", "HMMA"), ("90", "HGMMA"), ("100", "UTCHMMA")}


def test_a_tile_that_spills_is_found() -> None:
    code = inspect.cleandoc("""
        from functools import partial
        from hilora.kernels import launch, precompile
        from hilora.kernels.stacked_linear import devices, plan
        devices.Device.gemm_tile = lambda *call: launch.Tile(128, 128, 32, 4, 1)
        precompile.DTYPES = {"fp32": precompile.DTYPES["fp32"]}
        plan.cases = lambda dtype: [("small", partial(plan._step, dtype, 64, (8,), fused_qkv=False))]
        precompile.plans = lambda: [plan]
        print([row.fault for row in precompile.compile_all(80) if row.kernel == "gemm"])
    """)
    done = run("-c", code)
    assert "spills: " in done.stdout, done.stderr


def test_nothing_is_compiled_anew_where_a_table_grows() -> None:
    code = inspect.cleandoc("""
        import torch, triton
        from hilora.kernels import launch, precompile
        from hilora.kernels.stacked_linear import Tier, plan
        triton.runtime.driver.set_active(precompile.Pretended(90))
        seen = {}

        def count(kernel, grid, args, constants):
            seen.setdefault(kernel.__name__, set()).add(kernel.warmup(*args, grid=grid, **constants).hash)

        launch.launcher = count

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device="meta")

        for table in (1, 5, 9, 16, 17, 64):
            ranks, slot = empty(table, dtype=torch.int32), empty(3, dtype=torch.int32)
            tiers = [Tier(empty(table, 8, 64), empty(table, 64, 8), 2.0, slot, None, None, ranks, empty(table))]
            x, weight = empty(3, 37, 64), empty(64, 64)
            y, *inner = plan.forward(x, weight, None, tiers, [True], "split")
            plan.backward(y, inner, x, weight, tiers, [True], "split", True)
        print({name: len(hashes) for name, hashes in sorted(seen.items())})
    """)
    done = run("-c", code)
    assert done.stdout == "{'backward_rows': 1, 'pack': 1, 'shrink_expand': 1, 'sum_by_slot': 1}\n", done.stderr


def test_faults() -> None:
    good = precompile.Compiled(90, "gemm", "", "bf16", "", 186, 0, 147_456, "HGMMA")
    assert good.fault == ""
    assert good._replace(stack=8).fault == "spills: 8 bytes of stack"
    assert good._replace(arch=89, shared=101_377).fault == "101377 bytes of shared memory, 101376 are there"
    assert good._replace(instructions="HMMA").fault == "no HGMMA"
    assert good._replace(instructions="HMMA", arch=80).fault == ""
    assert good._replace(instructions="FFMA", dtype="fp32").fault == ""


def test_nothing_is_compiled_where_kernels_are_interpreted(capsys: pytest.CaptureFixture[str]) -> None:
    if not launch.interpreting():
        pytest.skip("kernels are compiled here")
    with pytest.raises(SystemExit):
        precompile.main([])
    assert "unset it" in capsys.readouterr().err
