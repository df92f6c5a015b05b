"""LoRA-FAIR's correction, worked out by hand and against a dense least-squares problem."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hilora.federated.strategies.lora_fair import corrected
from tests.federated.strategies.by_hand import RANK, Halves, everywhere

NUMBERS = torch.arange(1.0, 7)


def what_is_wanted(A: Tensor) -> Tensor:
    """The mean of the products after a round from A and a B of zeros: client i adds i + 1 to both."""
    ones = torch.ones(*A.shape[:1], 20, RANK, dtype=A.dtype)
    return torch.stack([number * ones @ (A + number) for number in NUMBERS]).mean(0)


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


@pytest.mark.parametrize(("penalty", "expected"), [(0.0, 2.0), (1.0, 1.5), (3.0, 1.25)])
def test_one_number(penalty: float, expected: float) -> None:
    """ΔW = (4, 1), Ā = (2, 0), B̄ = 1: (ΔW − B̄ Ā) Āᵀ = 4, Ā Āᵀ = 4 = s, so that ΔB = 4 / (4 + 4 λ)."""
    mean_A, mean_B = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0]])
    found = corrected(mean_A, mean_B, torch.tensor([[4.0, 1.0]]), torch.tensor([[1.0]]), penalty)
    assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [0.0, 0.01, 2.0])
def test_a_round_is_the_ridge_regression_of_the_mean_of_products(penalty: float) -> None:
    halves = Halves("lora-fair", residual_penalty=penalty)
    first = halves.server.root.A[0][0].double()
    halves.one_round()
    ((A, B),) = halves.server.root.factors
    torch.testing.assert_close(A[0].double(), first + 3.5, rtol=1e-5, atol=1e-5)
    everywhere(halves.server.head.bias, 3.5)
    wanted, mean_A, mean_B = what_is_wanted(first), first + 3.5, torch.full((3, 20, RANK), 3.5, dtype=torch.float64)
    for P in range(3):
        scale = mean_A[P].square().sum(1).mean()
        left = torch.cat([mean_A[P].T, (penalty * scale).sqrt() * torch.eye(RANK, dtype=torch.float64)])
        right = torch.cat([(wanted[P] - mean_B[P] @ mean_A[P]).T, torch.zeros(RANK, 20, dtype=torch.float64)])
        change = torch.linalg.lstsq(left, right).solution.T
        torch.testing.assert_close(B[0, P].double(), mean_B[P] + change, rtol=1e-4, atol=1e-4)


def test_without_a_penalty_no_other_b_is_nearer_in_distance_or_angle() -> None:
    halves = Halves("lora-fair", residual_penalty=0.0)
    first = halves.server.root.A[0][0].double()
    halves.one_round()
    ((A, B),) = ((A[0].double(), B[0].double()) for A, B in halves.server.root.factors)
    wanted, generator = what_is_wanted(first), torch.Generator().manual_seed(0)
    averaged = torch.full_like(B, 3.5) @ A
    assert (B @ A - wanted).norm() < (averaged - wanted).norm()
    for size in (0.01, 0.1, 1.0):
        other = (B + size * torch.randn(B.shape, generator=generator, dtype=B.dtype)) @ A
        assert (other - wanted).norm() > (B @ A - wanted).norm()
        assert cosine(other, wanted) < cosine(B @ A, wanted)


def test_a_large_penalty_is_fedit_and_so_are_clients_who_agree() -> None:
    kept, plain = Halves("lora-fair", residual_penalty=1e9), Halves("fedit")
    kept.one_round()
    plain.one_round()
    torch.testing.assert_close(kept.server.root.B[0], plain.server.root.B[0])
    agreed = Halves("lora-fair", residual_penalty=0.0)
    agreed.one_round(torch.tensor([2, 2, 2]))
    torch.testing.assert_close(agreed.server.root.B[0], torch.full((1, 3, 20, RANK), 3.0))


def test_clients_weigh_by_images_and_start_from_the_corrected_pair() -> None:
    halves = Halves("lora-fair", [40, 0, 0, 0, 0, 10, 0, 0], residual_penalty=0.0)
    A, ones = halves.server.root.A[0][0].double(), torch.ones(3, 20, RANK, dtype=torch.float64)
    halves.one_round()
    wanted = 0.8 * ones @ (A + 1) + 0.2 * 6 * ones @ (A + 6)
    root = halves.server.root
    torch.testing.assert_close(root.A[0][0].double(), A + 0.8 + 0.2 * 6, rtol=1e-5, atol=1e-5)
    projection = torch.linalg.pinv(root.A[0][0].double()) @ root.A[0][0].double()
    torch.testing.assert_close((root.B[0] @ root.A[0])[0].double(), wanted @ projection, rtol=1e-4, atol=1e-4)
    halves.round()
    torch.testing.assert_close(halves.calls[-1].models.tiers["root"].taken().B[0][3], root.B[0][0])
