"""What needs no GPU, against dense matrices in fp64: the reference, and the fast path in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor
from torch.autograd import forward_ad

from hilora import kernels
from hilora.kernels import (
    Tier,
    Tiers,
    gram_penalty,
    orthonormal_basis,
    stacked_lora_linear,
    subspace_distances,
    use_backend,
)
from hilora.kernels.stacked_linear import folded
from tests.kernels.cases import CASES, Adapters, Case, Q, V, dense, gradients, make, random

WAYS = {"reference": None, "folded": 0.0, "folded, beside": float("inf")}  # rows that are enough to fold into a weight


@pytest.fixture(params=WAYS, autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    enough = WAYS[request.param]
    if enough is not None:
        monkeypatch.setattr(folded, "ENOUGH", enough)
    with use_backend("reference" if enough is None else "folded"):
        yield request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_stacked_lora_linear_is_the_dense_product(case: Case) -> None:
    x, weight, bias, tiers = make(case)
    y, expected = stacked_lora_linear(x, weight, bias, tiers), dense(x, weight, bias, tiers)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for got, want in zip(gradients(y, x, tiers), gradients(expected, x, tiers), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [CASES["q and v of qkv"], CASES["slots that repeat or are none"]])
def test_stacked_lora_linear_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    x, weight, bias, tiers = make(case, dtype)
    y, expected = stacked_lora_linear(x, weight, bias, tiers), dense(x, weight, bias, tiers)
    assert y.dtype == dtype
    pairs = [(y, expected), *zip(gradients(y, x, tiers), gradients(expected, x, tiers), strict=True)]
    for got, want in pairs:
        assert got.dtype == dtype
        assert (got.double() - want.double()).norm() <= 4 * torch.finfo(dtype).eps * want.double().norm()


def test_fp32_adapters_beside_a_bf16_layer_have_fp32_gradients() -> None:
    x, weight, bias, tiers = make(CASES["a shared tier, one by cluster, one by client"])
    x = x.detach().bfloat16().requires_grad_()
    weight, bias = weight.bfloat16(), None if bias is None else bias.bfloat16()
    wide = [t._replace(A=t.A.detach().float().requires_grad_(), B=t.B.detach().float().requires_grad_()) for t in tiers]
    y, expected = stacked_lora_linear(x, weight, bias, wide), dense(x, weight, bias, wide)
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).norm() < 0.02 * expected.norm()
    for index, (got, want) in enumerate(zip(gradients(y, x, wide), gradients(expected, x, wide), strict=True)):
        assert got.dtype == (torch.float32 if index else torch.bfloat16)
        assert (got.double() - want.double()).norm() < 0.02 * want.double().norm()


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, weight, bias, tiers = make(CASES["slots that repeat or are none"])
    leaves = [x, *(factor for tier in tiers for factor in (tier.A, tier.B))]

    def function(x: Tensor, *factors: Tensor) -> Tensor:
        own = [t._replace(A=factors[2 * i], B=factors[2 * i + 1]) for i, t in enumerate(tiers)]
        return stacked_lora_linear(x, weight, bias, own)

    assert torch.autograd.gradcheck(function, leaves)


def test_inputs_need_not_be_contiguous() -> None:
    x, weight, bias, tiers = make(CASES["a shared tier, one by cluster, one by client"])
    strided = [
        t._replace(A=t.A.detach().mT.contiguous().mT, B=t.B.detach().transpose(0, 2).contiguous().transpose(0, 2))
        for t in tiers
    ]
    other = x.detach().permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(value.is_contiguous() for value in (other, strided[0].A, strided[1].B))
    y = stacked_lora_linear(other, weight.T.contiguous().T, bias, strided)
    torch.testing.assert_close(y, stacked_lora_linear(x, weight, bias, tiers), rtol=1e-12, atol=1e-12)


def test_adapters_with_zero_b_change_no_bit(backend: str) -> None:
    for name in ("q and v of qkv", "overlapping columns", "a shared tier, one by cluster, one by client"):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, bias, tiers = make(CASES[name], dtype)
            zero = [tier._replace(B=torch.zeros_like(tier.B)) for tier in tiers]
            y, plain = stacked_lora_linear(x, weight, bias, zero), torch.nn.functional.linear(x, weight, bias)
            if backend == "folded" and tiers[-1].slot is not None:  # a product for each group
                torch.testing.assert_close(y, plain)
            else:
                assert torch.equal(y, plain)


def test_an_adapter_that_no_group_uses_cannot_spoil_the_others() -> None:
    x, weight, bias, tiers = make(Case((2, 3, 7), 5, [Adapters(2, 3, [1, -1])]))
    with torch.no_grad():
        tiers[0].B[0], tiers[0].A[2] = torch.nan, torch.nan
    y = stacked_lora_linear(x, weight, bias, tiers)
    torch.testing.assert_close(y, dense(x, weight, bias, tiers), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[1], torch.nn.functional.linear(x[1], weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["a rank for each slot", "a rank for the only adapter"])
def test_what_lies_beyond_a_slots_rank_has_no_effect_and_no_gradient(name: str) -> None:
    x, weight, bias, tiers = make(CASES[name])
    want = stacked_lora_linear(x, weight, bias, tiers).detach()
    with torch.no_grad():
        for tier in tiers:
            for slot, rank in enumerate([] if tier.ranks is None else tier.ranks.tolist()):
                tier.A[slot, rank:], tier.B[slot, :, rank:] = torch.nan, torch.nan
    y = stacked_lora_linear(x, weight, bias, tiers)
    assert torch.equal(y, want)
    _, *found = gradients(y, x, tiers)
    for tier, dA, dB in zip(tiers, found[::2], found[1::2], strict=True):
        for slot, rank in enumerate([] if tier.ranks is None else tier.ranks.tolist()):
            assert not dA[slot, rank:].any()
            assert not dB[slot, :, rank:].any()
    assert all(gradient.isfinite().all() for gradient in found)


def test_dropout_is_on_the_adapters_alone() -> None:
    torch.manual_seed(0)
    x, weight, bias, tiers = make(Case((50, 7), 15, [Adapters(2, columns=Q), Adapters(2, columns=V)]))
    base = torch.nn.functional.linear(x, weight, bias)
    full = stacked_lora_linear(x, weight, bias, tiers)
    draws = torch.stack([stacked_lora_linear(x, weight, bias, tiers, dropout=0.25) for _ in range(2000)]).detach()
    ones, no_weight = torch.ones(400, 50, dtype=torch.float64), torch.zeros(50, 50, dtype=torch.float64)
    identity = Tier(torch.eye(50).double()[None], torch.eye(50).double()[None], 1.0)
    dropped = stacked_lora_linear(ones, no_weight, None, [identity], dropout=0.25)
    assert dropped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert (dropped == 0).double().mean().item() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(draws[0][:, 5:10], base[:, 5:10])
    assert not torch.equal(draws[0], draws[1])
    deviation = (draws - base).std(0) / 2000**0.5
    assert ((draws.mean(0) - full).abs() <= 6 * deviation + 1e-9).all()


WRONG: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of another width": ({"x": random(2, 3, 6)}, ValueError, r"x \(2, 3, 6\), weight \(5, 7\)"),
    "a vector of no width": ({"x": random(1).squeeze()}, ValueError, r"x \(\)"),
    "weight of one dimension": ({"weight": random(7)}, ValueError, r"weight \(7,\)"),
    "bias of another width": ({"bias": random(4)}, ValueError, r"bias \(4,\)"),
    "A of another width": (
        {"A": random(2, 3, 6)},
        ValueError,
        r"A \(2, 3, 6\) and B \(2, 5, 3\) do not fit: expected A ",
    ),
    "B of another width": ({"B": random(2, 4, 3)}, ValueError, r"B \[S, 5, r\]"),
    "ranks that differ": ({"B": random(2, 5, 2)}, ValueError, r"B \(2, 5, 2\) do not fit"),
    "tables that differ": ({"B": random(3, 5, 3)}, ValueError, r"B \(3, 5, 3\) do not fit"),
    "A without slots": ({"A": random(3, 7), "B": random(5, 3)}, ValueError, r"A \(3, 7\) and B \(5, 3\)"),
    "columns beyond the outputs": (
        {"columns": (1, 5)},
        ValueError,
        r"start 1, width 5\) reach outside of the 5 outputs",
    ),
    "negative columns": ({"columns": (-1, 5)}, ValueError, "reach outside"),
    "columns narrower than B": ({"columns": (0, 4)}, ValueError, "and 4 columns"),
    "slots of floats": ({"slot": torch.zeros(2)}, ValueError, r"integers \[G\], got torch.float32 \(2,\)"),
    "slots that are bool": ({"slot": torch.zeros(2, dtype=torch.bool)}, ValueError, "got torch.bool"),
    "slots of two dimensions": (
        {"slot": torch.zeros(2, 1, dtype=torch.int32)},
        ValueError,
        r"got torch.int32 \(2, 1\)",
    ),
    "ranks of another table": (
        {"ranks": torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"ranks must hold integers \[2\]",
    ),
    "ranks of floats": ({"ranks": torch.zeros(2)}, ValueError, "got torch.float32"),
    "scales of another table": (
        {"scales": torch.ones(3)},
        ValueError,
        r"slot_scales must be fp32 \[2\], got torch.float32 \(3,\)",
    ),
    "scales that are narrow": ({"scales": torch.ones(2).bfloat16()}, ValueError, "got torch.bfloat16"),
    "slots for other groups": ({"slot": torch.zeros(3, dtype=torch.int32)}, ValueError, r"G = 3"),
    "x without groups": ({"x": random(6, 7)}, ValueError, r"x \(6, 7\) must be \[G, M, in\] with G = 2"),
    "a slot that is not there": ({"slot": torch.tensor([0, 2])}, IndexError, "index 2 is out of bounds"),
}


@pytest.mark.parametrize(("change", "error", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_shapes_are_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": random(2, 3, 7), "weight": random(5, 7), "bias": random(5), "slot": None}
    given |= {"A": random(2, 3, 7), "B": random(2, 5, 3), "columns": None, "ranks": None, "scales": None} | change
    tier = Tier(given["A"], given["B"], 1.0, given["slot"], given["columns"], None, given["ranks"], given["scales"])
    with pytest.raises(error, match=message):
        stacked_lora_linear(given["x"], given["weight"], given["bias"], [tier])


def test_tiers_with_other_factors_know_what_is_known_of_their_kind_and_no_more() -> None:
    x, weight, bias, (tier,) = make(Case((4, 7), 5, [Adapters(2)]))
    tiers = Tiers([tier])
    stacked_lora_linear(x, weight, bias, tiers)
    assert tiers.with_factors([(tier.A, tier.B)]) is tiers
    A, B = random(1, 2, 7, seed=8), random(1, 5, 2, seed=9)
    others = tiers.with_factors([(A, B)])
    with torch.no_grad():
        y = stacked_lora_linear(x, weight, bias, others)
    torch.testing.assert_close(y, dense(x, weight, bias, others))
    assert others.recall("checked", (x.shape, weight.shape, weight.shape[:1]), pytest.fail, "this is known")
    with pytest.raises(ValueError, match=r"A \(1, 2, 6\) and B \(1, 5, 2\) do not fit"):
        stacked_lora_linear(x, weight, bias, tiers.with_factors([(A[..., :6], B)]))


def test_a_frozen_factor_that_was_written_to_since_is_an_error_where_it_is_needed_again(backend: str) -> None:
    if backend == "reference":
        pytest.skip("autograd has copies of its own")
    x, weight, bias, (tier, other) = make(Case((4, 7), 5, [Adapters(2), Adapters(3)]))
    frozen = other._replace(A=other.A.detach(), B=other.B.detach())
    y = stacked_lora_linear(x, weight, bias, [tier, frozen])
    frozen.B.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_forward_mode_differentiates_frozen_factors() -> None:
    x, weight, bias, (tier,) = make(Case((4, 7), 5, [Adapters(2)]))
    A, B, tangent = tier.A.detach(), tier.B.detach(), random(1, 2, 7, seed=7)

    def of(A: Tensor) -> Tensor:
        return stacked_lora_linear(x, weight, bias, [tier._replace(A=A, B=B)])

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(of(forward_ad.make_dual(A, tangent))).tangent
    torch.testing.assert_close(found, of(A + tangent) - of(A))


PENALTIES = {
    "nothing frozen": ((2, 3, 7, 2), []),
    "one tier": ((3, 1, 7, 2), [(3, 1, 7, 4)]),
    "root for all, cluster for each": ((2, 3, 7, 2), [(2, 1, 7, 3), (2, 3, 7, 1)]),
    "one active against several": ((2, 1, 7, 2), [(2, 3, 7, 2), (2, 1, 7, 2)]),
    "wide ranks": ((2, 1, 20, 17), [(2, 3, 20, 16), (2, 1, 20, 3)]),
    "rank above the width": ((1, 2, 3, 5), [(1, 2, 3, 4)]),
}


@pytest.mark.parametrize(("active_shape", "frozen_shapes"), PENALTIES.values(), ids=PENALTIES.keys())
def test_gram_penalty_is_the_dense_one(active_shape: tuple[int, ...], frozen_shapes: list[tuple[int, ...]]) -> None:
    active = random(*active_shape, seed=1).requires_grad_()
    frozen = [random(*shape, seed=2 + i) for i, shape in enumerate(frozen_shapes)]
    gammas = [0.5, 2.0][: len(frozen)]
    slots = max([active_shape[1], *(shape[1] for shape in frozen_shapes)])
    expected = [torch.zeros((), dtype=torch.float64) for _ in range(slots)]
    for B, gamma in zip(frozen, gammas, strict=True):
        for slot in range(slots):
            for p in range(active_shape[0]):
                one, other = active[p, slot % active_shape[1]], B[p, slot % B.shape[1]]
                expected[slot] = expected[slot] + gamma * torch.trace(other @ other.T @ one @ one.T)
    each = gram_penalty(active, frozen, gammas, per_slot=True)
    torch.testing.assert_close(each, torch.stack(expected), rtol=1e-12, atol=1e-12)
    total = gram_penalty(active, frozen, gammas)
    torch.testing.assert_close(total, each.sum(), rtol=1e-12, atol=1e-12)
    if frozen:
        (got,) = torch.autograd.grad(total, active)
        (want,) = torch.autograd.grad(torch.stack(expected).sum(), active)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_gram_penalty_is_fp32_for_narrow_factors_and_under_autocast() -> None:
    active, frozen = random(1, 1, 64, 4, seed=1), random(1, 1, 64, 4, seed=2)
    narrow = gram_penalty(active.bfloat16(), [frozen.bfloat16()], [1.0])
    exact = gram_penalty(active.bfloat16().double(), [frozen.bfloat16().double()], [1.0])
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), exact, rtol=1e-6, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = gram_penalty(active.float(), [frozen.float()], [1.0])
    torch.testing.assert_close(cast.double(), gram_penalty(active, [frozen], [1.0]), rtol=1e-6, atol=0)
    assert gram_penalty(active.float().to("meta"), [frozen.float().to("meta")], [1.0]).shape == ()


@pytest.mark.parametrize(
    ("active", "frozen", "gammas", "message"),
    [
        (random(2, 3, 7, 2), [random(2, 1, 7, 2)], [], "1 frozen tiers need as many gammas, got 0"),
        (random(3, 7, 2), [], [], r"expected active \[P, S, out, r\], got \(3, 7, 2\)"),
        (random(2, 3, 7, 2), [random(2, 7, 2)], [1.0], r"frozen \(2, 7, 2\) does not fit active \(2, 3, 7, 2\)"),
        (random(2, 3, 7, 2), [random(1, 3, 7, 2)], [1.0], "does not fit"),
        (random(2, 3, 7, 2), [random(2, 3, 6, 2)], [1.0], "does not fit"),
        (random(2, 3, 7, 2), [random(2, 2, 7, 2)], [1.0], "does not fit"),
    ],
)
def test_gram_penalty_refuses_shapes_that_do_not_fit(
    active: Tensor, frozen: list[Tensor], gammas: list[float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        gram_penalty(active, frozen, gammas)


@pytest.mark.parametrize("shape", [(7, 3), (2, 4, 7, 3), (3, 3), (3, 7, 1), (2, 5)])
def test_orthonormal_basis_spans_what_the_columns_span(shape: tuple[int, ...]) -> None:
    B = random(*shape)
    U = orthonormal_basis(B)
    rank = min(shape[-2:])
    assert U.shape == B.shape
    gram = torch.diag_embed((torch.arange(shape[-1]) < rank).double()).expand(*shape[:-2], -1, -1)
    torch.testing.assert_close(U.mT @ U, gram, rtol=0, atol=1e-12)
    torch.testing.assert_close(U @ U.mT @ B, B, rtol=0, atol=1e-12)
    sizes = (U.mT @ B).norm(dim=-1)
    assert (sizes.diff() <= 1e-12).all(), "columns are ordered by singular value"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_orthonormal_basis_has_zero_columns_where_the_rank_is_short(dtype: torch.dtype) -> None:
    B = torch.stack([torch.zeros(9, 4, dtype=torch.float64), 1e-4 * random(9, 1) @ random(1, 4, seed=1)])
    B = torch.cat([B, 1e-30 * random(1, 9, 4, seed=2)]).to(dtype)
    if dtype == torch.bfloat16:
        B[1] = B[1, :, :1].expand(-1, 4)  # rounding must not raise the rank
    U = orthonormal_basis(B)
    assert U.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert U.norm(dim=-2).round().tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]
    assert not U[0].any()


def dense_distances(U: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """1 − the mean squared cosine of the principal angles, averaged over projections, by scipy; columns of zeros are no
    part of a basis."""
    clients, projections = U.shape[:2]
    found = np.zeros((clients, clients))
    for i in range(clients):
        for j in range(clients):
            pairs = [[basis[:, basis.any(0)].numpy() for basis in (U[i, p], U[j, p])] for p in range(projections)]
            cosines = [np.cos(subspace_angles(*pair)) ** 2 if all(b.size for b in pair) else [0] for pair in pairs]
            found[i, j] = np.mean([1 - np.mean(c) for c in cosines]) if i != j else 0
    return found


def test_subspace_distances_are_those_of_principal_angles() -> None:
    U = orthonormal_basis(random(6, 3, 8, 2))
    U[4] = U[1]
    distances = subspace_distances(U)
    np.testing.assert_allclose(distances.numpy(), dense_distances(U), atol=1e-12)
    assert distances[4, 1] < 1e-12
    eye = torch.eye(8, dtype=torch.float64)
    orthogonal = torch.stack([eye[:, :2], eye[:, 2:4], eye[:, [0, 3]]])[:, None]
    expected = torch.tensor([[0, 1, 0.5], [1, 0, 0.5], [0.5, 0.5, 0]], dtype=torch.float64)
    torch.testing.assert_close(subspace_distances(orthogonal), expected)


def test_subspace_distances_do_not_depend_on_bases_or_order() -> None:
    U = orthonormal_basis(random(7, 3, 8, 3))
    distances = subspace_distances(U)
    turns = torch.linalg.qr(random(7, 3, 3, 3, seed=1))[0]
    torch.testing.assert_close(subspace_distances(U @ turns), distances, rtol=0, atol=1e-12)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(subspace_distances(U[order]), distances[order][:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_subspace_distances_are_symmetric_to_the_bit_with_a_zero_diagonal(dtype: torch.dtype) -> None:
    U = orthonormal_basis(random(20, 4, 31, 3)).to(dtype)
    U[3] = 0
    with torch.autocast("cpu", torch.bfloat16):
        distances = subspace_distances(U)
    assert distances.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(distances, distances.T)
    assert not distances.diagonal().any()
    assert ((distances >= 0) & (distances <= 1)).all()
    assert (distances[3, :3] == 1).all(), "a client without directions is far from all others"
    if dtype == torch.float32:
        torch.testing.assert_close(distances.double(), subspace_distances(U.double()), rtol=0, atol=1e-5)


def test_subspaces_of_unequal_ranks_are_compared_by_the_smaller_one() -> None:
    U = orthonormal_basis(random(5, 3, 8, 4))
    U[1] = U[0]
    U[1, :, :, 1:] = 0  # of rank 1, within that of client 0
    U[2, 0, :, 3:], U[2, 1, :, 2:], U[2, 2, :, :] = 0, 0, 0
    U[3] = 0
    distances = subspace_distances(U)
    np.testing.assert_allclose(distances.numpy(), dense_distances(U), atol=1e-12)
    assert distances[0, 1] == pytest.approx(0, abs=1e-12)
    assert (distances[3, [0, 1, 2, 4]] == 1).all()


def test_zero_columns_that_all_have_change_no_distance() -> None:
    U = orthonormal_basis(random(6, 3, 8, 2))
    wide = torch.nn.functional.pad(U, (0, 2))
    torch.testing.assert_close(subspace_distances(wide), subspace_distances(U), rtol=0, atol=1e-12)


def test_distances_of_full_ranks_are_those_of_one_division() -> None:
    U = orthonormal_basis(random(7, 3, 16, 3)).float()
    similarity = torch.zeros(7, 7)
    for basis in U.unbind(1):
        wide = basis.transpose(0, 1).reshape(16, -1)
        similarity += (wide.T @ wide).view(7, 3, 7, 3).square().sum((1, 3))
    distances = (1 - similarity / 9).clamp(0, 1)
    assert torch.equal(subspace_distances(U), ((distances + distances.T) / 2).fill_diagonal_(0))


def test_subspace_distances_refuse_another_shape() -> None:
    with pytest.raises(ValueError, match=r"bases \[N, P, out, r\], got \(3, 8, 2\)"):
        subspace_distances(random(3, 8, 2))


@pytest.mark.parametrize(
    "name", ["three tiers of mixed ranks, no bias", "a shared tier, one by cluster, one by client"]
)
def test_a_gain_multiplies_a_tier_row_by_row(name: str) -> None:
    x, weight, bias, tiers = make(CASES[name])
    gain = random(*x.shape[:-1], seed=9).requires_grad_()
    tiers[1] = tiers[1]._replace(gain=gain)
    alone = [dense(x, torch.zeros_like(weight), None, [tier]) for tier in tiers]
    expected = dense(x, weight, bias, []) + alone[0] + gain.unsqueeze(-1) * alone[1] + alone[2]
    y = kernels.stacked_lora_linear(x, weight, bias, tiers)
    torch.testing.assert_close(y, expected)
    leaves = [x, gain, tiers[1].A, tiers[1].B]
    direction = random(*y.shape, seed=4)
    got, want = (torch.autograd.grad((out * direction).sum(), leaves, retain_graph=True) for out in (y, expected))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


def test_a_gain_has_a_value_for_each_row() -> None:
    x, weight, bias, tiers = make(CASES["one tier"])
    with pytest.raises(ValueError, match="gain"):
        kernels.stacked_lora_linear(x, weight, bias, [tiers[0]._replace(gain=torch.ones(3))])


def test_gradients_can_be_differentiated_once_more_where_that_is_asked_for() -> None:
    x, weight, bias, tiers = make(CASES["three tiers of mixed ranks, no bias"])
    wide = x.detach().repeat(8, 1, 1, 1)

    def slope(B: torch.Tensor) -> torch.Tensor:
        y = kernels.stacked_lora_linear(wide, weight, bias, [tiers[0]._replace(B=B)])
        (found,) = torch.autograd.grad(y.square().sum(), B, create_graph=True)
        return found

    with kernels.twice_differentiable():
        (second,) = torch.autograd.grad(slope(tiers[0].B).sum(), tiers[0].B)
    step = 1e-6
    with kernels.twice_differentiable():
        ahead, behind = (slope((tiers[0].B + s).detach().requires_grad_()) for s in (step, -step))
    torch.testing.assert_close(second.sum(), ((ahead - behind) / (2 * step)).sum().detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["three tiers of mixed ranks, no bias", "slots that repeat or are none", "one tier"])
def test_a_graph_of_gradients_can_be_differentiated(name: str) -> None:
    x, weight, bias, tiers = make(CASES[name])
    leaves = [x, *(factor for tier in tiers for factor in (tier.A, tier.B))]

    def second(y: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        return (*first, *torch.autograd.grad(torch.stack([one.square().sum() for one in first]).sum(), leaves))

    found = second(stacked_lora_linear(x, weight, bias, tiers)), second(dense(x, weight, bias, tiers))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_graph_of_gradients_of_one_layer_used_twice() -> None:
    x, weight, bias, tiers = make(Case((9, 7), 7, [Adapters(2)]))

    def second(layer: Any) -> tuple[Tensor, ...]:
        y = layer(layer(x, weight, bias, tiers).sin(), weight, bias, tiers)
        (first,) = torch.autograd.grad(y.square().sum(), tiers[0].B, create_graph=True)
        return first, *torch.autograd.grad(first.square().sum(), [x, tiers[0].A])

    for got, want in zip(second(stacked_lora_linear), second(dense), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("slots", [1, 3])
def test_a_graph_of_the_penalty_s_gradient_can_be_differentiated(slots: int) -> None:
    active, frozen = random(2, 1, 9, 2).requires_grad_(), random(2, slots, 9, 3, seed=1)
    (first,) = torch.autograd.grad(gram_penalty(active, [frozen], [0.5]), active, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), active)
    gram = (frozen @ frozen.mT).sum(1, keepdim=True)  # the penalty's gradient is γ · 2 G B
    torch.testing.assert_close(first, gram @ active)
    torch.testing.assert_close(second, 2 * gram @ gram @ active)
