"""Steps that a GPU replays as a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hilora.federated.engine.graph import Replay
from hilora.models.backbone import Backbone
from tests.federated.engine.test_batched import IMAGES, SHARES, make, some_models, train

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
    """Two trainings and an evaluation between them, two clients at once: the second and all later ones replay."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"clients_at_once": 2, "schedule": schedule, "clip_norm": 1.0, "augment": True}
    cpu, gpu = make(backbone, **options), make(backbone, "cuda", **options)
    models = some_models(cpu)
    for tier in ("cluster", "leaf", "leaf"):
        a, b = (train(engine, tier, models) for engine in (cpu, gpu))
        for one, other in ((a.tiers[tier], b.tiers[tier]), (a.head, b.head)):
            for name, value in one.tensors().items():
                difference = (value - other.tensors()[name]).double().norm()
                assert difference <= 2e-2 * value.double().norm(), (tier, name)
        torch.testing.assert_close(a.loss, b.loss, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert gpu._ready is not None
        assert gpu._ready[1].training.run.graph is not None  # type: ignore[attr-defined]
        right = [engine.evaluate(IMAGES, SHARES, models.after(a)).correct for engine in (cpu, gpu)]
        torch.testing.assert_close(*right, rtol=0, atol=0.1, equal_nan=True)
