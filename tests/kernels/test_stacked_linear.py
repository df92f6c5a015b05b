"""The Triton kernels of the stacked linear layer against dense matrices in fp64: on a GPU, or in the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hilora.kernels import Tier, stacked_lora_linear, use_backend
from tests.kernels.cases import CASES, Adapters, Case, Q, V, dense, error, gradients, make, moved, random

pytestmark = pytest.mark.slow

pytest.importorskip("triton")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
LARGER = {
    "mixed ranks, many chunks": Case(
        (2, 5, 40),
        120,
        [Adapters(64, columns=(0, 40)), Adapters(1, columns=(0, 40)), Adapters(33, 2, [1, 0], (80, 40))],
    ),
    "q and v, ranks of several chunks": Case(
        (2, 5, 24), 72, [Adapters(rank, columns=(start, 24)) for start in (0, 48) for rank in (8, 7, 9)]
    ),
    "rows of several tiles": Case((2, 37, 33), 99, [Adapters(8, 2, [0, 1], (0, 33)), Adapters(8, columns=(66, 33))]),
}


@pytest.fixture(params=["fused", "split"], autouse=True)
def plan(request: pytest.FixtureRequest) -> Iterator[str]:
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    with use_backend(request.param):
        yield request.param
    torch.use_deterministic_algorithms(False)


def check(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: list[Tier], tolerance: float) -> None:
    """Forward, and every gradient."""
    expected = dense(x, weight, bias, tiers)
    own_x, own_weight, own_bias, own = moved(x, weight, bias, tiers)
    y = stacked_lora_linear(own_x, own_weight, own_bias, own)
    assert y.dtype == x.dtype
    assert error(y, expected) <= tolerance
    direction = random(*expected.shape, seed=4).to(x.dtype).double()
    leaves = [leaf for leaf in (x, *(f for t in tiers for f in (t.A, t.B))) if leaf.requires_grad]
    own_leaves = [leaf for leaf in (own_x, *(f for t in own for f in (t.A, t.B))) if leaf.requires_grad]
    want = torch.autograd.grad((expected * direction).sum(), leaves, allow_unused=True)
    got = torch.autograd.grad(y, own_leaves, direction.to(y), allow_unused=True)
    for leaf, mine, theirs in zip(leaves, got, want, strict=True):
        if not leaf.numel():
            continue  # an adapter of an empty table
        assert mine is not None
        assert mine.dtype == leaf.dtype
        assert mine.shape == leaf.shape
        assert error(mine, torch.zeros_like(leaf) if theirs is None else theirs) <= tolerance


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", (CASES | LARGER).values(), ids=(CASES | LARGER).keys())
def test_it_is_the_dense_product(case: Case, dtype: torch.dtype) -> None:
    check(*make(case, dtype), TOLERANCE[dtype])


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_it_is_the_dense_product_for_any_shape(data: st.DataObject) -> None:
    groups, rows, width, part = (data.draw(st.integers(1, most)) for most in (3, 40, 40, 20))
    tiers = []
    for _ in range(data.draw(st.integers(1, 4))):
        columns = data.draw(st.sampled_from([None, (0, part), (2 * part, part), (1, part)]))
        slots = data.draw(st.integers(1, 3))
        slot = data.draw(st.lists(st.integers(-1, slots - 1), min_size=groups, max_size=groups))
        tiers.append(Adapters(data.draw(st.integers(1, 20)), slots, slot, columns))
    case = Case((groups, rows, width), 3 * part, tiers, bias=data.draw(st.booleans()))
    check(*make(case, torch.float32), TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("a shared tier, one by cluster, one by client", torch.bfloat16),
        ("q and v, ranks of several chunks", torch.float32),
    ],
)
def test_only_what_is_in_training_has_a_gradient(name: str, dtype: torch.dtype) -> None:
    x, weight, bias, tiers = make((CASES | LARGER)[name], dtype)
    for trained in itertools.product([False, True], repeat=len({tier.rank for tier in tiers})):
        own = [
            tier._replace(A=tier.A.detach().requires_grad_(on), B=tier.B.detach().requires_grad_(on))
            for tier, on in zip(tiers, itertools.cycle(trained), strict=False)
        ]
        check(x.detach().requires_grad_(trained[0] or not any(trained)), weight, bias, own, TOLERANCE[dtype])
        if not any(trained):
            assert not stacked_lora_linear(*moved(x.detach(), weight, bias, own)).requires_grad


def test_fp32_adapters_beside_a_bf16_layer() -> None:
    x, weight, bias, tiers = make(CASES["slots that repeat or are none"], torch.bfloat16)
    wide = [
        tier._replace(A=tier.A.detach().float().requires_grad_(), B=tier.B.detach().float().requires_grad_())
        for tier in tiers
    ]
    check(x, weight, bias, wide, 1e-2)


def test_strided_inputs() -> None:
    x, weight, bias, tiers = make(CASES["a shared tier, one by cluster, one by client"], torch.float32)
    strided = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0).requires_grad_()
    assert not strided.is_contiguous()
    own = [
        tier._replace(
            A=tier.A.detach().mT.contiguous().mT.requires_grad_(),
            slot=tier.slot if tier.slot is None else tier.slot.long(),
        )
        for tier in tiers
    ]
    check(strided, weight.T.contiguous().T, bias, own, 1e-5)
    check(x.detach()[:, ::2].requires_grad_(), weight, bias, tiers, 1e-5)


def test_a_gradient_without_memory_of_its_own() -> None:
    x, weight, bias, tiers = make(CASES["q and v of qkv"], torch.float32)
    own_x, own_weight, own_bias, own = moved(x, weight, bias, tiers)
    stacked_lora_linear(own_x, own_weight, own_bias, own).sum().backward()  # an expanded scalar
    dense(x, weight, bias, tiers).sum().backward()
    assert own_x.grad is not None
    assert x.grad is not None
    assert error(own_x.grad, x.grad) <= 1e-5
    assert own[0].B.grad is not None
    assert tiers[0].B.grad is not None
    assert error(own[0].B.grad, tiers[0].B.grad) <= 1e-5


def test_a_slot_outside_of_its_table_spoils_its_own_group_alone() -> None:
    x, weight, bias, tiers = moved(
        *make(Case((3, 4, 7), 15, [Adapters(2, 2, [1, 2, -1], Q), Adapters(2, columns=V)]), torch.float32)
    )
    far = torch.tensor([1, 2**32, -1], device=x.device)  # not to be taken for 0 in int32
    for slot in (tiers[0].slot, far):
        y = stacked_lora_linear(x, weight, bias, [tiers[0]._replace(slot=slot), tiers[1]])
        assert y[1, :, : Q[1]].isnan().all()
        assert y[[0, 2]].isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
def test_what_lies_beyond_a_slots_rank_has_no_effect_and_no_gradient() -> None:
    x, weight, bias, tiers = moved(*make(CASES["a rank for each slot"], torch.float32))
    with torch.no_grad():
        for tier in tiers:
            assert tier.ranks is not None
            for slot, rank in enumerate(tier.ranks.tolist()):
                tier.A[slot, rank:], tier.B[slot, :, rank:] = torch.nan, torch.nan
        x[1, 2] = torch.inf  # zero times infinity is no zero
    y = stacked_lora_linear(x, weight, bias, tiers)
    assert y[[0, 2]].isfinite().all()
    _, *found = gradients(y[[0, 1, 2]], x, tiers)
    for tier, dA, dB in zip(tiers, found[::2], found[1::2], strict=True):
        for slot, rank in enumerate(tier.ranks.tolist() if tier.ranks is not None else []):
            assert not dA[slot, rank:].any()
            assert not dB[slot, :, rank:].any()


def test_gradients_of_clients_do_not_mix() -> None:
    case = Case((3, 20, 24), 24, [Adapters(4, 3, [0, 1, 2])])
    x, weight, bias, tiers = moved(*make(case, torch.float32))
    together = gradients(stacked_lora_linear(x, weight, bias, tiers), x, tiers)
    x = x.detach().clone()
    x[1] = float("nan")
    spoilt = gradients(stacked_lora_linear(x.requires_grad_(), weight, bias, tiers), x, tiers)
    for one, other in zip(together, spoilt, strict=True):
        assert torch.equal(one[[0, 2]], other[[0, 2]])
    assert spoilt[1][1].isnan().any()
