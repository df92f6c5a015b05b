"""`pytest tests/kernels/emulator/descriptor_kernels.py --emulate sm_90`: what Triton makes of tensor descriptors.

A persistent product whose loops are pipelined: by TMA and mbarriers on sm_90, by plain loads and `cp.async` on sm_80.
`tests/kernels/test_emulated.py` starts it.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from hilora.kernels import launch
from hilora.kernels.emulator import launching
from hilora.kernels.emulator.errors import Fault

PROGRAMS = 3


def product(
    x, weight, y, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr,
    DEPTH: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """`y = x weightᵀ`"""
    columns = tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BM) * columns, PROGRAMS, flatten=FLATTEN):
        i, j = tile // columns * BM, tile % columns * BN
        acc = tl.zeros([BM, BN], tl.float32)
        for k in tl.range(0, K, BK, num_stages=DEPTH):
            acc = tl.dot(x.load([i, k]), weight.load([j, k]).T, acc)
        y.store([i, j], acc.to(y.dtype))


def run(dtype: torch.dtype, tile: tuple[int, int, int], warps: int, depth: int, flatten: bool) -> tuple[Tensor, Tensor]:
    """What is found, and what is wanted."""
    torch.manual_seed(0)
    x, weight = torch.randn(300, 200).to(dtype), torch.randn(136, 200).to(dtype)
    y = torch.full((300, 136), torch.nan, dtype=dtype)
    BM, BN, BK = tile

    def described(tensor: Tensor, *box: int) -> Any:
        return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), list(box))

    args = (described(x, BM, BK), described(weight, BN, BK), described(y, BM, BN), 300, 136, 200)
    constants = launch.Constants(BM=BM, BN=BN, BK=BK, PROGRAMS=PROGRAMS, DEPTH=depth, FLATTEN=flatten, num_warps=warps)
    launch.launcher(JITFunction(product), (PROGRAMS,), args, constants)
    return y, x.double() @ weight.double().T


@pytest.mark.parametrize(
    ("dtype", "tile", "warps", "depth", "flatten"),
    [
        (torch.bfloat16, (128, 128, 64), 8, 3, False),
        (torch.bfloat16, (128, 128, 64), 8, 3, True),
        (torch.float16, (64, 64, 32), 4, 4, False),  # swizzles of 64 bytes, and
        (torch.bfloat16, (64, 32, 16), 4, 2, True),  # of 32
        (torch.float32, (64, 64, 32), 4, 3, False),
        (torch.bfloat16, (128, 64, 64), 4, 1, False),  # without a pipeline
    ],
)
def test_a_persistent_product(
    dtype: torch.dtype, tile: tuple[int, int, int], warps: int, depth: int, flatten: bool
) -> None:  # fmt: skip
    found, wanted = run(dtype, tile, warps, depth, flatten)
    assert (found - wanted).abs().max() <= 4e-3 * wanted.abs().max()


WAITING = r"\{\s*\.reg \.pred complete;.*?bra\.uni waitLoop;\s*\}"
NEEDED = ["cp.async.bulk.wait_group", "cp.async.bulk.commit_group", "fence.proxy.async", "wgmma.wait_group", "bar.sync"]


@pytest.mark.parametrize("flatten", [False, True])
def test_a_statement_less_is_found(flatten: bool, request: pytest.FixtureRequest, monkeypatch: Any) -> None:
    if request.config.getoption("--emulate") != "sm_90":
        return  # there is no TMA
    execute = launching.execute
    found: dict[str, set[str]] = {}

    def several(ptx: str, *rest: Any) -> Any:
        every = {statement: rf"\b{re.escape(statement)}[^;]*;" for statement in NEEDED} | {"wait": WAITING}
        for name, pattern in every.items():
            races = execute(re.sub(pattern, "", ptx, flags=re.DOTALL), *rest)
            found[name] = {re.sub(" in shared.*|, .*", "", what) for what in races}
        with pytest.raises(Fault, match="threads wait for an mbarrier that nothing completes"):
            execute(re.sub(r"@%p\d+ mbarrier\.arrive[^;]*;", "", ptx), *rest)
        return execute(ptx, *rest)

    monkeypatch.setattr(launching, "execute", several)
    run(torch.bfloat16, (128, 128, 64), 8, 3, flatten)
    assert {"wgmma of a TMA load in flight", "end under a TMA load in flight"} <= found["wait"]
    assert "TMA load under a wgmma in flight" in found["wgmma.wait_group"]
    assert found["fence.proxy.async"] == {"TMA store of a write without fence.proxy.async"}
    assert "write under a TMA store in flight" in found["cp.async.bulk.wait_group"]
    assert "end under a TMA store in flight" in found["cp.async.bulk.commit_group"]
    assert {"TMA store after write", "write under a TMA store in flight"} <= found["bar.sync"]
