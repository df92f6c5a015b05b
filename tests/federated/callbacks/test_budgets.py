"""What a run says of the clients of each budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.federated.simulation import Simulation
from tests.federated.conftest import Simulate

BUDGETS: dict[str, Any] = {"rank_budgets": "1/2:4,1/2:1", "rank": 4, "rounds": [2, 1, 0]}


def test_groups_of_budgets_have_figures_of_their_own(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate("flexlora", **BUDGETS)
    groups = simulation.run()["budgets"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["budgets"] == groups
    assert [(group["ranks"], group["layers"]) for group in groups] == [(4, None), (1, None)]
    assert sorted(groups[0]["clients"] + groups[1]["clients"]) == [0, 1, 2, 3, 4]  # the seen ones
    each = dict(zip(range(5), simulation.summary()["per_client"]["test"], strict=True))
    for group in groups:
        own = [each[client] for client in group["clients"]]
        assert group["accuracy"]["mean"] == pytest.approx(sum(own) / len(own))
        adapter, head = 4 * group["ranks"] * 2 * 24 * 4, (6 * 24 + 6) * 4
        assert group["up"] == adapter + head
    assert groups[0]["flops"] - groups[1]["flops"] == pytest.approx(3 * (4 * 3 * 2 * 5 * 48))  # three ranks more


def test_without_budgets_nothing_is_said(simulate: Simulate) -> None:
    assert "budgets" not in simulate("fedit", rounds=[1, 0, 0]).run()


def test_a_resumed_run_counts_on(simulate: Simulate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = simulate("flexlora", out=tmp_path / "whole", **BUDGETS).run()
    simulation = simulate("flexlora", **BUDGETS)
    round = Simulation._round

    def stopped(self: Simulation, stage: object) -> None:
        if self.round == 1:
            raise KeyboardInterrupt
        round(self, stage)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Simulation, "_round", stopped)
        with pytest.raises(KeyboardInterrupt):
            simulation.run()
    resumed = simulate("flexlora", resume=True, **BUDGETS)
    assert resumed.round == 1
    assert resumed.run()["budgets"] == whole["budgets"]
    assert torch.equal(resumed.post.up, simulation.post.up * 3)
