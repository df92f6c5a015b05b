"""A kernel that was compiled is found again for arguments that Triton would not compile it anew for, and no others."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
CODE = inspect.cleandoc("""
    from itertools import combinations

    import torch, triton
    import triton.language as tl

    from hilora.kernels import precompile
    from hilora.kernels.launch import Constants, kind

    @triton.jit
    def copy(x, numbers, N, y, BLOCK: tl.constexpr):
        n = tl.arange(0, BLOCK)
        value = tl.load(x + n, n < N)
        if y is not None:
            tl.store(y + n + numbers[0] + N, value * numbers[1])

    triton.runtime.driver.set_active(precompile.Pretended(90))
    memory = torch.empty(64)
    given = [
        (x, numbers, count, memory)
        for x in (memory, memory[1:], memory[4:], memory.half())
        for numbers in ((1, 2.0), (2, 3.0), (16, 2.0), (1, 1.0))
        for count in (1, 3, 5, 16, 48, 2**31, 2**32 - 16)
    ]
    given += [(memory, (1, 2.0), 3, None), (memory, (1, 2.0), 3, memory[1:])]
    compiled = [copy.warmup(*args, grid=(1,), **Constants(BLOCK=16)).hash for args in given]
    kinds = [kind(args) for args in given]
    for (own, one), (other_own, other) in combinations(zip(kinds, compiled), 2):
        assert own != other_own or one == other, (own, one, other)
    print(len(set(kinds)), len(set(compiled)))
""")


def test_what_triton_tells_apart_is_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "kinds.py"  # Triton reads a kernel's source
    file.write_text(CODE)
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kinds, compiled = map(int, done.stdout.split())
    assert kinds >= compiled >= 20
