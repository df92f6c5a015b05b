"""A tier that is trained through a step of another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.engine.optim import Slotted
from hilora.federated.local.bilevel import Bilevel, _BilevelTraining
from hilora.federated.settings import TrainingSettings
from hilora.models.backbone import Backbone
from tests.federated.conftest import same
from tests.federated.engine.test_batched import make, some_models, task, train

ALPHA, LR = 0.7, 0.01


class TwoNumbers:
    """In the place of a bench: two clients whose logits are (x y, 0), y the lower level."""

    settings = TrainingSettings()
    pixels = torch.ones(2, 1, 3, 1, 1, dtype=torch.uint8)

    def __init__(self) -> None:
        self.x, self.y = (
            torch.tensor([[value], [value / 2]], dtype=torch.float64, requires_grad=True) for value in (1.5, 0.8)
        )
        self.trained: Sequence[Slotted] = [Slotted(self.x, 0, LR)]
        self.now = self.y

    def predict(self, pixels: Tensor) -> Tensor:
        return torch.cat([self.x * self.now, torch.zeros_like(self.x)], 1)[:, None]  # [G, 1, 2]

    def penalty(self) -> Tensor:
        raise AssertionError("a bilevel problem has no penalty")

    def ranks(self, tier: str) -> Tensor:
        raise AssertionError("there are no adapters")

    def factors(self, tier: str, factors: str, lr: float) -> list[Slotted]:
        assert (tier, factors) == ("leaf", "AB")
        return [Slotted(self.y, 0, lr)]

    @contextmanager
    def holding(self, values: Mapping[int, Tensor]) -> Iterator[None]:
        self.now = values[id(self.y)]
        yield
        self.now = self.y


def test_a_step_follows_the_gradient_through_the_lower_one() -> None:
    """f(x, y) = CE of logits (x y, 0): the upper gradient must be d/dx f(x, y − α ∂f/∂y(x, y)), both levels moved."""
    bench = TwoNumbers()
    x, y = bench.x.detach().clone(), bench.y.detach().clone()

    def f(x: Tensor, y: Tensor) -> Tensor:
        loss: Tensor = torch.log1p(torch.exp(-x * y)).sum()  # class 0 is right
        return loss

    def lowered(x: Tensor) -> Tensor:
        slope: Tensor = torch.func.grad(f, argnums=1)(x, y)
        return y - ALPHA * slope

    through = torch.func.grad(lambda x: f(x, lowered(x)))(x)
    direct = torch.func.grad(f)(x, lowered(x))
    training = Bilevel("leaf", ALPHA).training(bench)
    assert isinstance(training, _BilevelTraining)
    gradients: list[Tensor] = []
    step = training.optimiser.step

    def noted(found: Sequence[Tensor], *more: Any) -> None:
        gradients.extend(found)
        step(found, *more)

    training.optimiser.step = noted  # type: ignore[method-assign, assignment]
    training.begin(torch.tensor([1, 1]))
    training.step(bench.pixels, torch.tensor([[0], [-1]]))  # the second client has no image
    torch.testing.assert_close(gradients[0][0], through[0])
    assert (through[0] - direct[0]).abs() > 1e-3  # the second order is more than nothing here
    torch.testing.assert_close(bench.y.detach()[0], lowered(x)[0])
    assert torch.equal(bench.y.detach()[1], y[1])
    torch.testing.assert_close(bench.x.detach(), x - LR * torch.tensor([[1.0], [0.0]]) * through.sign())


@pytest.mark.parametrize("augment", [False, True])
def test_clients_train_alone(backbone: Backbone, double: None, augment: bool) -> None:
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, augment=augment) for size in (4, 1))
    torch.manual_seed(0)
    models = some_models(together)
    what = task("root", algorithm=Bilevel("leaf", 0.3), penalty=())
    a, b = (train(engine, what, models) for engine in (together, alone))
    assert set(a.tiers) == {"root", "leaf"}
    for tier in a.tiers:
        assert same(a.tiers[tier], b.tiers[tier], 1e-9)
        start = models.tiers[tier].taken()
        moved = [not torch.equal(a.tiers[tier].B[0][i], start.B[0][i]) for i in range(4)]
        assert moved == [True, True, False, True]
    assert same(a.head, b.head, 1e-9)
