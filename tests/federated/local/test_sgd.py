"""Mini-batch steps of AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor

from hilora.federated.engine.optim import Slotted
from hilora.federated.local.sgd import LocalSGD, SGDTraining
from hilora.federated.settings import TrainingSettings


class OneNumber:
    """In the place of a bench: each client has one number, times the first pixels."""

    pixels = torch.zeros(2, 1, 3, 2, 2, dtype=torch.uint8)

    def __init__(self, **options: object) -> None:
        self.settings = TrainingSettings(**options)
        self.weight = torch.zeros(2, 1, requires_grad=True)
        self.trained: Sequence[Slotted] = [Slotted(self.weight, 0, 1.0)]

    def predict(self, pixels: Tensor) -> Tensor:
        return torch.stack([self.weight * pixels[:, :, 0, 0, 0], torch.zeros(2, 1)], -1)  # [G, 1, 2]

    def penalty(self) -> Tensor:
        return torch.zeros(2)

    def ranks(self, tier: str) -> Tensor:
        raise AssertionError("there are no adapters")

    def factors(self, tier: str, factors: str, lr: float) -> list[Slotted]:
        raise AssertionError("not of this algorithm")

    def holding(self, values: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        return nullcontext()


PIXELS = torch.ones(2, 1, 3, 2, 2, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8536, 0.5, 0.1464])]
)
def test_schedules_run_over_each_clients_own_steps(schedule: str, rates: list[float]) -> None:
    training = LocalSGD().training(OneNumber(schedule=schedule))
    assert isinstance(training, SGDTraining)
    for _ in range(2):  # the second time as the first
        training.begin(torch.tensor([4, 2]))
        found = []
        for step in range(4):
            rate = training._rate()
            assert rate is not None
            found.append(rate.tolist())
            target = torch.tensor([[0], [0 if step < 2 else -1]])
            training.step(PIXELS, target)
        assert [first for first, _ in found] == pytest.approx(rates, abs=1e-4)
        assert [second for _, second in found] == pytest.approx([1, 0.5, 0, 0], abs=1e-4)


def test_a_client_without_an_image_stays_and_its_loss_is_not_counted() -> None:
    bench = OneNumber()
    training = LocalSGD().training(bench)
    training.begin(torch.tensor([2, 1]))
    for target in ([[0], [0]], [[0], [-1]]):
        before = bench.weight.detach().clone()
        training.step(PIXELS, torch.tensor(target))
    assert bench.weight[0] != before[0]
    assert bench.weight[1] == before[1]
    first = torch.log(torch.tensor(2.0))
    torch.testing.assert_close(training.loss[1], first)
    assert training.loss[0] > first


def test_two_that_are_equal_train_alike_and_serve_again() -> None:
    assert LocalSGD() == LocalSGD()
    assert hash(LocalSGD()) == hash(LocalSGD())
