"""What launches do is counted as it can be counted by hand, at any shape and for any kernel."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("gcc") is None, reason="Triton's launcher is compiled by gcc"),
]
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
    "PYTHONPATH": str(ROOT)
}
KERNELS = inspect.cleandoc("""
    import json
    import torch, triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
    from hilora.kernels.account import Account
    from hilora.kernels.launch import Constants, launch

    @triton.jit
    def shifted(source, target, slot, N, BLOCK: tl.constexpr):
        n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + n, n < N)
        tl.store(target + n + tl.load(slot + 1), value, n < N)

    @triton.jit
    def product(x, w, y, K, B: tl.constexpr, PROGRAMS: tl.constexpr, TILES: tl.constexpr):
        for tile in tl.range(tl.program_id(0), TILES, PROGRAMS):
            acc = tl.zeros([B, B], tl.float32)
            for k in tl.range(0, K, B, num_stages=3):
                acc = tl.dot(x.load([tile * B, k]), w.load([0, k]).T, acc)
            y.store([tile * B, 0], acc.to(y.dtype))

    def call():
        def empty(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device="meta")

        launch(shifted, (4,), empty(1000), empty(1024), empty(3, dtype=torch.int32), 1000,
               constants=Constants(BLOCK=256))
        x, w, y = empty(290, 200), empty(64, 200), empty(290, 64)
        boxes = [TensorDescriptor(one, list(one.shape), list(one.stride()), [64, 64]) for one in (x, w, y)]
        launch(product, (3,), *boxes, 200, constants=Constants(B=64, PROGRAMS=3, TILES=5, num_warps=4))
        torch.mm(x, w.T, out=y)

    account = Account(ARCH)
    rows = [(row.name, row.counts.flops, row.counts.tensors, row.host) for row in account.rows(call)]
    print(json.dumps(rows))
""")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    given = [sys.executable, *command]
    return subprocess.run(given, env=ENVIRONMENT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arch", [80, 90])
def test_launches_are_counted(arch: int, tmp_path: Path) -> None:
    """Of 1000 of 4 x 256 numbers, and of a product of 290 x 200 and 200 x 64 in tiles of 64, by 3 programs."""
    (tmp_path / "kernels.py").write_text(KERNELS.replace("ARCH", str(arch)))
    done = run(str(tmp_path / "kernels.py"))
    assert done.returncode == 0, done.stderr
    copy, product, torch_product = json.loads(done.stdout)
    assert copy[:2] == ["shifted", 0]
    assert copy[2]["source"] == [2000, 0, 2016, 0]
    assert copy[2]["target"] == [0, 2000, 0, 2016]  # one further on, as the second slot says
    assert copy[2]["slot"][2] == 32
    assert product[:2] == ["product", 2 * (5 * 64) * 64 * (4 * 64)]
    assert product[2]["x"] == [290 * 200 * 2, 0, 290 * 200 * 2, 0]
    assert product[2]["w"] == [5 * 64 * 200 * 2, 0, 64 * 200 * 2, 0]  # once a tile
    assert product[2]["y"] == [0, 290 * 64 * 2, 0, 290 * 64 * 2]
    assert 0 < copy[3] < 1
    assert torch_product[:2] == ["torch.mm.out", 2 * 290 * 200 * 64]
    assert torch_product[3] == 0


def test_a_layer() -> None:
    small = ["--rows", "70", "--width", "64", "--ranks", "4", "8"]
    fused, split = (run("-m", "hilora.kernels.account", *small, "--plan", plan) for plan in ("fused", "split"))
    assert fused.returncode == split.returncode == 0, fused.stderr + split.stderr
    launches = [re.findall(r"^(\w[\w.]*) +[\d. ]+$", done.stdout, re.MULTILINE) for done in (fused, split)]
    assert "forward_tiles" in launches[0]
    assert "torch.addmm.default" not in launches[0]
    assert "torch.addmm.default" in launches[1]
    assert all(done.stdout.count(": floor ") == 2 for done in (fused, split))
    x = re.search(r"^  x +(.*)$", split.stdout, re.MULTILINE)
    assert x is not None
    assert x[1].split() == ["0.01", "0.00", "0.01", "0.00"]


def test_cases_of_precompile() -> None:
    done = run("-m", "hilora.kernels.account", "--case", "no such", "--dtype", "fp32")
    assert done.returncode == 2
    assert "no case of fp32 has 'no such'" in done.stderr
    done = run("-m", "hilora.kernels.account", "--case", "r 8 against 8, 8", "--dtype", "fp32", "--arch", "sm_80")
    assert done.returncode == 0, done.stderr
    assert re.search(r"^weighted_grams .*^penalty_gradient ", done.stdout, re.MULTILINE | re.DOTALL)


def test_the_library_does_not_load_what_only_this_needs() -> None:
    code = "import sys, hilora, hilora.kernels; hilora.kernels.backends.operations(); print(*sys.modules)"
    assert "emulator" not in run("-c", code).stdout
