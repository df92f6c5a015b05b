"""`pytest tests/kernels/emulator/emulated_kernels.py --emulate sm_90`: the share that every test run emulates.

Tiles are those of a GPU, and shapes are larger than one, and odd. `tests/kernels/test_emulated.py` starts it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from hilora.kernels import orthonormal_basis, subspace_distances, use_backend
from hilora.kernels.overlaps import reference
from tests.kernels.cases import Adapters, Case, error, make, random
from tests.kernels.test_gram import check_penalty
from tests.kernels.test_stacked_linear import TOLERANCE, check

CASES = {
    "clients with slots, odd widths, several tiles": Case(
        (2, 70, 136),
        408,
        [Adapters(rank, 3, [2, 0], (start, 136)) for start in (0, 272) for rank in (8, 8, 8)],
    ),
    "a scale for each slot": Case(
        (2, 40, 72), 136, [Adapters(8, 3, [2, 0], (64, 72), [5, 8, 8], [2.0, 0.5, -1.5]), Adapters(4, 2, scales=[3, 1])]
    ),
    "many chunks of mixed ranks, some beyond their slot's": Case(
        (2, 33, 72),
        72,
        [Adapters(64), Adapters(33, 2, [1, -1]), Adapters(5, 2, [0, 1], ranks=[3, 0])],
        bias=False,
    ),
}
LARGE = Case((1, 130, 128), 256, [Adapters(8), Adapters(16, columns=(64, 128))])  # the largest tile of sm_90


@pytest.fixture(autouse=True)
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("plan", ["fused", "split"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_forward_and_every_gradient(case: Case, dtype: torch.dtype, plan: str) -> None:
    with use_backend(plan):
        check(*make(case, dtype), TOLERANCE[dtype])


def test_the_largest_tile() -> None:
    with use_backend("fused"):
        check(*make(LARGE, torch.bfloat16), TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=3)))
def test_every_combination_in_training(trained: tuple[bool, ...], dtype: torch.dtype) -> None:
    """Of three tiers, whose ranks in bf16 are one chunk and in fp32 several."""
    x, weight, bias, tiers = make(Case((40, 40), 80, [Adapters(rank) for rank in (8, 20, 12)]), dtype)
    own = [
        tier._replace(A=tier.A.detach().requires_grad_(on), B=tier.B.detach().requires_grad_(on))
        for tier, on in zip(tiers, trained, strict=True)
    ]
    with use_backend("split"):
        check(x, weight, bias, own, TOLERANCE[dtype])


def test_fp32_as_tf32() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        U = orthonormal_basis(random(9, 2, 70, 8)).float()
        with use_backend("fused"):
            check(*make(LARGE, torch.float32), 2e-3)
            assert error(subspace_distances(U), reference.subspace_distances(U.double())) <= 1e-3
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize(("rank", "out"), [(8, 200), (20, 70)])
def test_penalties(rank: int, out: int) -> None:
    with use_backend("fused"):
        check_penalty(
            random(1, 2, out, rank).float(),
            [random(1, 1, out, 8, seed=1).float(), random(1, 2, out, rank, seed=2).float()],
        )


def test_distances() -> None:
    U = orthonormal_basis(random(11, 2, 70, 8)).float()
    with use_backend("fused"):
        assert error(subspace_distances(U), reference.subspace_distances(U.double())) <= 1e-5
