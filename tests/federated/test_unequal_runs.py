"""Whole runs of clients with budgets: one by one as at once, resumed as in one go, and with robust means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.federated.simulation import Simulation
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, same
from tests.federated.test_partial_messages import BUDGETS

ADAPTIVE = {"rank": [2, 3, 4], "lora_alpha": [4, 6, 8], "rank_budgets": "1/2:2,1/2:1", "rank_energy": 0.8}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, given) for name, given in BUDGETS.items()}
RUNS |= {"hilora": ("hilora", BUDGETS["flexlora"]), "adaptive": ("hilora", ADAPTIVE)}
each_run = pytest.mark.parametrize(("name", "options"), RUNS.values(), ids=list(RUNS))


def alike(one: Simulation, other: Simulation, tolerance: float = 1e-9) -> None:
    everyone = torch.arange(6)
    a, b = one.models(everyone), other.models(everyone)
    for tier, rows in a.tiers.items():
        found, expected = b.tiers[tier].taken(), rows.taken()
        assert torch.equal(found.rank, expected.rank)
        for name, value in expected.tensors().items():
            assert (value - found.tensors()[name]).double().norm() <= tolerance * value.double().norm()
    assert same(a.head.taken(), b.head.taken(), tolerance)
    assert torch.equal(one.post.up, other.post.up)


@each_run
def test_one_by_one_is_the_same_as_at_once(
    simulate: Simulate, backbone: Backbone, double: None, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    backbone.model.double()
    alone, together = (
        simulate(name, out=tmp_path / str(n), clients_at_once=n, rounds=[2, 1, 1], **options) for n in (1, None)
    )
    a, b = alone.run(), together.run()
    alike(alone, together)
    assert a["final"] == b["final"]
    for one, other in zip(a["budgets"], b["budgets"], strict=True):
        assert one["flops"] == pytest.approx(other["flops"])


@each_run
def test_resumed_it_is_the_same(
    simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    whole = simulate(name, out=tmp_path / "whole", rounds=[2, 1, 1], **options)
    whole.run()
    stopped = simulate(name, rounds=[2, 1, 1], **options)
    go_on = Simulation._round

    def at_most_two(self: Simulation, stage: Any) -> None:
        if self.round == 2:
            raise KeyboardInterrupt
        go_on(self, stage)

    with monkeypatch.context() as patched:
        patched.setattr(Simulation, "_round", at_most_two)
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    resumed = simulate(name, rounds=[2, 1, 1], resume=True, **options)
    resumed.run()
    alike(whole, resumed, 0.0)


@pytest.mark.parametrize("robust", ["clip", "trimmed", "median"])
@each_run
def test_means_may_be_robust(simulate: Simulate, name: str, options: dict[str, Any], robust: str) -> None:
    summary = simulate(name, robust=robust, update_bound=1e3, rounds=[1, 1, 1], **options).run()
    assert summary["final"]["mean"] is not None
    assert len(summary["budgets"]) == 2


@pytest.mark.parametrize("name", ["hetlora", "fslora", "flora", "fed-hello", "fedra"])
def test_a_method_whose_clients_send_parts_has_no_use_of_a_noised_mean(simulate: Simulate, name: str) -> None:
    with pytest.raises(ValueError, match="needs more of what clients send than a mean"):
        simulate(name, dp_clip=1.0)
