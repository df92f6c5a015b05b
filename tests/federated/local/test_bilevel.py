"""Steps that a GPU replays as a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from hilora.federated.engine.batched import Cohort, Lower, Task
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.state import Models, Trained
from hilora.federated.engine.training import BilevelTraining, Replay
from hilora.models.backbone import Backbone
from tests.federated.conftest import same
from tests.federated.engine.test_batched import IDS, IMAGES, SHARES, make, some_models

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")


def test_without_a_gpu_every_call_is_a_call() -> None:
    calls: list[int] = []
    replay = Replay(lambda: calls.append(len(calls)), torch.device("cpu"))
    for _ in range(5):
        replay()
    assert calls == [0, 1, 2, 3, 4]
    assert replay.graph is None


@needs_gpu
def test_a_captured_call_goes_on_with_what_is_in_its_tensors() -> None:
    x, total = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    calls: list[None] = []

    def add() -> None:
        calls.append(None)
        total.add_(x)

    replay = Replay(add, torch.device("cuda"))
    for value in range(6):
        x.fill_(value)
        replay()
    assert total.tolist() == [15.0] * 3
    assert len(calls) == Replay.WARM_UP + 1


@needs_gpu
@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_training_by_a_graph_is_training(backbone: Backbone, schedule: str) -> None:
    """Two trainings and an evaluation between them, in cohorts of two: the second and all later ones replay."""
    torch.manual_seed(0)
    options = {"cohort_size": 2, "schedule": schedule, "clip_norm": 1.0, "augment": True}
    cpu = make(backbone, **options)
    gpu = Cohort(backbone, cpu.config.tiers, cpu.run, torch.device("cuda"), torch.float32)
    models = some_models(cpu)
    for tier in ("cluster", "leaf", "leaf"):
        a, b = (_train(cohort, models, tier) for cohort in (cpu, gpu))
        for name, value in {**a.adapters, **a.head}.items():
            other = {**b.adapters, **b.head}[name]
            assert (value - other).norm() <= 2e-2 * value.norm(), (tier, name)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert gpu._ready is not None
        assert gpu._ready.training.run.graph is not None
        right = [cohort.evaluate(IMAGES, SHARES, models.replaced(tier, a)).correct for cohort in (cpu, gpu)]
        torch.testing.assert_close(*right, rtol=0, atol=0.1, equal_nan=True)


def _train(cohort: Cohort, models: Models, tier: str) -> Trained:
    return cohort.train(IMAGES, SHARES, models, Task(tier, 2), IDS, "training", 1)


def test_a_bilevel_step_follows_the_gradient_through_the_lower_one() -> None:
    """f(x, y) = CE of logits (x y, 0): the upper gradient must be d/dx f(x, y − α ∂f/∂y(x, y)), both levels moved."""
    alpha, lr = 0.7, 0.01
    x, y = (torch.tensor([[value], [value / 2]], dtype=torch.float64, requires_grad=True) for value in (1.5, 0.8))
    ones = torch.ones(2, 1, 3, 1, 1, dtype=torch.uint8)

    def logits(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * y, torch.zeros_like(x)], 1)[:, None]  # [G, 1, 2]

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loss: torch.Tensor = torch.log1p(torch.exp(-x * y)).sum()  # class 0 is right
        return loss

    def lowered(x: torch.Tensor) -> torch.Tensor:
        slope: torch.Tensor = torch.func.grad(f, argnums=1)(x, y.detach())
        return y.detach() - alpha * slope

    through = torch.func.grad(lambda x: f(x, lowered(x)))(x.detach())
    direct = torch.func.grad(f)(x.detach(), lowered(x.detach()))
    expected_y = lowered(x.detach())
    start = x.detach().clone()
    training = BilevelTraining(
        lambda pixels: logits(x, y),
        lambda pixels, values: logits(x, values[0]),
        [Slotted(x, 0, lr)],
        [Slotted(y, 0, alpha)],
        ones,
        weight_decay=0.0,
        clip_norm=None,
        schedule="constant",
    )
    gradients: list[torch.Tensor] = []
    step = training.optimiser.step

    def noted(found: Sequence[torch.Tensor], *more: Any) -> None:
        gradients.extend(found)
        step(found, *more)

    training.optimiser.step = noted  # type: ignore[method-assign, assignment]
    training.begin(torch.tensor([1, 1]))
    training.step(ones, torch.tensor([[0], [-1]]))  # the second client has no image
    torch.testing.assert_close(gradients[0][0], through[0])
    assert (through[0] - direct[0]).abs() > 1e-3  # the second order is more than nothing here
    torch.testing.assert_close(y.detach()[0], expected_y[0])
    assert torch.equal(y.detach()[1], torch.tensor([0.4], dtype=torch.float64))
    torch.testing.assert_close(x.detach(), start - lr * torch.tensor([[1.0], [0.0]]) * through.sign())


def test_pf2loras_clients_train_alone_in_a_cohort(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    together, alone = (make(backbone, cohort_size=size) for size in (4, 1))
    torch.manual_seed(0)
    models = some_models(together)
    task = Task("root", 2, lower=Lower("leaf", 0.3))
    a, b = (cohort.train(IMAGES, SHARES, models, task, IDS, "training") for cohort in (together, alone))
    assert same(a.adapters, b.adapters, 1e-9)
    assert same(a.lower, b.lower, 1e-9)
    assert same(a.head, b.head, 1e-9)
    start = models.tiers["leaf"].taken()
    assert [not torch.equal(a.lower["B0"][i], start["B0"][i]) for i in range(4)] == [True, True, False, True]
    assert [not torch.equal(a.adapters["B0"][i], models.tiers["root"].taken()["B0"][i]) for i in range(4)] == [
        *(True, True, False, True)
    ]
