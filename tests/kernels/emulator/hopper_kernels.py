"""`pytest tests/kernels/emulator/hopper_kernels.py --emulate sm_90`: the kernels that only GPUs of sm_90 have.

A few programs go over all tiles, so that each finishes one while it fetches the next.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hilora.kernels import launch, stacked_lora_linear, use_backend
from hilora.kernels.stacked_linear import devices, hopper
from tests.kernels.cases import Adapters, Case, error, make, random
from tests.kernels.test_stacked_linear import TOLERANCE, check

QKV = Case((1, 200, 192), 576, [Adapters(8, columns=(start, 192)) for start in (0, 384) for _ in range(3)])
CASES = {
    "q and v of a qkv": QKV,
    "clients with slots, the widest tiles": Case(
        (2, 140, 256), 768, [Adapters(8, 3, [2, -1], (start, 256)) for start in (0, 512) for _ in range(3)], bias=False
    ),
    "the whole layer, ends of tiles in both directions": Case((1, 70, 72), 200, [Adapters(8), Adapters(5)]),
    "ranks of slots, up to the most": Case(
        (2, 130, 64), 128, [Adapters(40, 2, [1, 0], (64, 64), ranks=[40, 7]), Adapters(20, columns=(64, 64))]
    ),
    "k alone, odd columns left": Case((1, 64, 200), 264, [Adapters(3, columns=(64, 64))]),
}
BY_ROWS = {"the whole layer, ends of tiles in both directions"}  # backward: 200 columns are no steps of 64


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of all kernels that are launched; on a GPU of three processors, and no row of its own."""
    names: list[str] = []
    launcher = launch.launcher

    def noting(kernel, grid, args, constants) -> None:
        names.append(kernel.__name__)
        launcher(kernel, grid, args, constants)

    monkeypatch.setattr(launch, "launcher", noting)
    monkeypatch.setattr(hopper, "processors", lambda: 3)
    monkeypatch.setattr(hopper, "device", lambda of: devices._row("", 90))
    return names


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in CASES), ("q and v of a qkv", torch.float16)]
)
def test_forward_and_every_gradient(name: str, dtype: torch.dtype, launched: list[str]) -> None:
    with use_backend("fused"):
        check(*make(CASES[name], dtype), TOLERANCE[dtype])
    assert "forward_tiles" in launched
    assert ("backward_rows" if name in BY_ROWS else "backward_tiles") in launched


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)))
def test_every_combination_in_training(trained: tuple[bool, ...], launched: list[str]) -> None:
    x, weight, bias, tiers = make(
        Case((1, 80, 64), 192, [Adapters(rank, columns=(start, 64)) for start in (0, 128) for rank in (8, 20, 3)]),
        torch.bfloat16,
    )
    own = [
        tier._replace(A=tier.A.detach().requires_grad_(on), B=tier.B.detach().requires_grad_(on))
        for tier, on in zip(tiers, trained * 2, strict=True)
    ]
    with use_backend("fused"):
        check(x, weight, bias, own, TOLERANCE[torch.bfloat16])
    assert {"forward_tiles", "backward_tiles"} <= set(launched)


def test_a_slot_outside_of_its_table(launched: list[str]) -> None:
    """Is NaN in its group, in the tier's columns; other groups do not see it."""
    x, weight, bias, tiers = make(
        Case((2, 66, 64), 192, [Adapters(8, 2, [0, 1], (0, 64)), Adapters(8, 2, [0, 1], (128, 64))]), torch.bfloat16
    )
    wrong = [tier._replace(slot=torch.tensor([0, 7], dtype=torch.int32)) for tier in tiers]
    with use_backend("fused"):
        y, right = (stacked_lora_linear(x, weight, bias, own) for own in (wrong, tiers))
        (dx,) = torch.autograd.grad(y[0].sum(), x, retain_graph=True)
        (wanted,) = torch.autograd.grad(right[0].sum(), x)
    assert torch.equal(y[0], right[0])
    assert torch.equal(y[1, :, 64:128], right[1, :, 64:128])
    assert y[1, :, :64].isnan().all()
    assert y[1, :, 128:].isnan().all()
    assert torch.equal(dx[0], wanted[0])


@pytest.mark.parametrize("what", ["rows apart", "rows that copies cannot take"])
def test_rows_that_lie_anywhere(what: str, launched: list[str]) -> None:
    _, weight, bias, tiers = make(QKV, torch.bfloat16)
    apart = 8 if what == "rows apart" else 4
    memory = random(1, 200, 192 + apart, seed=9).to(torch.bfloat16)
    rows = memory[..., :192].requires_grad_()
    with use_backend("fused"):
        check(rows, weight, bias, tiers, TOLERANCE[torch.bfloat16])
    assert ("forward_tiles" in launched) == (apart == 8)


def test_gradients_that_lie_apart(launched: list[str]) -> None:
    x, weight, bias, tiers = make(QKV, torch.bfloat16)

    def gradient(dy: Tensor) -> Tensor:
        with use_backend("fused"):
            y = stacked_lora_linear(x, weight, bias, tiers)
        return torch.autograd.grad(y, x, dy)[0]

    dy = random(1, 200, 576, seed=3).to(torch.bfloat16)
    expanded = dy[:, :1].expand_as(dy)  # the same row again and again, which copies of tiles do not take
    assert error(gradient(expanded), gradient(expanded.contiguous())) <= TOLERANCE[torch.bfloat16]
    assert {"backward_rows", "backward_tiles"} <= set(launched)
    assert error(gradient(dy.mT.contiguous().mT), gradient(dy)) <= TOLERANCE[torch.bfloat16]
