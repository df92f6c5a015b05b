"""The Triton kernels of penalties and distances against fp64: on a GPU, or in the interpreter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hilora.kernels import gram_penalty, orthonormal_basis, subspace_distances, use_backend
from hilora.kernels.overlaps import reference
from tests.kernels.cases import DEVICE, error, random

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def triton_only() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    with use_backend("fused"):
        yield
    torch.use_deterministic_algorithms(False)


def check_penalty(active: Tensor, frozen: list[Tensor], tolerance: float = 1e-5) -> None:
    """Each slot's penalty, and the gradient of a weighted sum of them."""
    gammas = [0.5, 2.0, 0.1][: len(frozen)]
    exact = active.detach().double().requires_grad_()
    want = reference.gram_penalty(exact, [B.double() for B in frozen], gammas, per_slot=True)
    own = active.detach().to(DEVICE).requires_grad_()
    got = gram_penalty(own, [B.to(DEVICE) for B in frozen], gammas, per_slot=True)
    assert got.dtype == torch.float32
    assert error(got, want) <= tolerance
    weights = random(*want.shape, seed=9)
    (gradient,) = torch.autograd.grad(got, own, weights.to(got))
    assert gradient.dtype == active.dtype
    assert gradient.shape == active.shape
    assert error(gradient, torch.autograd.grad(want, exact, weights)[0]) <= max(
        tolerance, torch.finfo(active.dtype).eps
    )
    assert error(gram_penalty(own, [B.to(DEVICE) for B in frozen], gammas), want.sum()) <= tolerance


SHAPES = {
    "one tier": ((3, 1, 7, 2), [(3, 1, 7, 4)]),
    "root for all, cluster for each": ((2, 3, 70, 2), [(2, 1, 70, 3), (2, 3, 70, 1)]),
    "one active against several": ((2, 1, 33, 2), [(2, 3, 33, 2), (2, 1, 33, 2)]),
    "three frozen tiers, rank above the width": ((1, 2, 3, 5), [(1, 2, 3, 4), (1, 1, 3, 7), (1, 2, 3, 1)]),
    "large ranks": ((1, 2, 40, 64), [(1, 2, 40, 20)]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("active", "frozen"), SHAPES.values(), ids=SHAPES.keys())
def test_penalty(active: tuple[int, ...], frozen: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    check_penalty(random(*active, seed=1).to(dtype), [random(*f, seed=2 + i).to(dtype) for i, f in enumerate(frozen)])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 150), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_penalty_of_any_shape(count: int, slots: int, out: int, rank: int, other: int, shared: bool) -> None:
    check_penalty(
        random(count, slots, out, rank).float(), [random(count, 1 if shared else slots, out, other, seed=1).float()]
    )


def test_penalty_of_strided_factors() -> None:
    active, frozen = random(2, 33, 3, 2).float().movedim(1, 2), random(2, 3, 2, 33, seed=1).float().mT
    assert not active.is_contiguous()
    assert not frozen.is_contiguous()
    check_penalty(active, [frozen])


@pytest.mark.parametrize(
    "shape", [(5, 2, 40, 3), (1, 1, 4, 2), (20, 3, 33, 8), (3, 1, 70, 20), (9, 5, 8, 1), (40, 1, 9, 2)]
)
def test_distances(shape: tuple[int, ...]) -> None:
    U = orthonormal_basis(random(*shape)).float()
    if shape[0] > 3:
        U[2] = 0  # a client without directions
        U[3] = U[0]
        U[4, -1, :, 1:] = 0  # and one of smaller rank in a projection
    got = subspace_distances(U.to(DEVICE))
    assert error(got, reference.subspace_distances(U.double())) <= 1e-5
    assert torch.equal(got, got.T)
    assert not got.diagonal().any()
    if shape[0] > 3:
        assert got[0, 3] < 1e-5
        assert got[2, 1] == 1


def test_small_distances_keep_their_order() -> None:
    base, turn = orthonormal_basis(random(1, 4, 60, 4)), random(12, 4, 60, 4, seed=1)
    U = orthonormal_basis(base + 0.02 * torch.linspace(0.5, 1, 12).double()[:, None, None, None] * turn)
    exact = reference.subspace_distances(U)
    assert 0.005 < exact[0, 1:].mean() < 0.05
    got = subspace_distances(U.float().to(DEVICE)).cpu().double()
    pairs = torch.triu_indices(12, 12, 1)
    assert torch.equal(got[pairs[0], pairs[1]].argsort(), exact[pairs[0], pairs[1]].argsort())


def test_what_the_kernels_do_not_do_is_the_references() -> None:
    U = orthonormal_basis(random(3, 2, 8, 2))
    assert torch.equal(subspace_distances(U), reference.subspace_distances(U)), "fp64"
    narrow = U.float().requires_grad_()
    assert torch.autograd.grad(subspace_distances(narrow).sum(), narrow)[0].any(), "gradients of distances"
    frozen = random(2, 1, 8, 2).float().requires_grad_()
    penalty = gram_penalty(random(2, 1, 8, 2, seed=1).float(), [frozen], [1.0])
    assert torch.autograd.grad(penalty, frozen)[0].any(), "gradients of frozen tiers"
    assert subspace_distances(torch.empty(0, 2, 8, 2)).shape == (0, 0)


def test_empty_tables_and_large_ranks_are_left_to_others() -> None:
    active = random(2, 1, 8, 2).float().to(DEVICE)
    empty = active.new_empty(2, 0, 8, 3)
    assert gram_penalty(active, [empty], [1.0]) == 0
    large = random(1, 1, 40, 70).float()
    torch.testing.assert_close(
        gram_penalty(large.to(DEVICE), [large.to(DEVICE)], [1.0]).cpu(), reference.gram_penalty(large, [large], [1.0])
    )
