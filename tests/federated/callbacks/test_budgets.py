"""What a run says of the clients of each budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.federated.simulation import Simulation
from hilora.federated.strategies.hilora import HiLoRA
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
        assert group["parameters"] == (adapter + head) / 4
        assert group["held"] == {"root": group["ranks"]}
    assert simulation.summary()["trained_parameters"] == groups[0]["parameters"]
    assert groups[0]["flops"] - groups[1]["flops"] == pytest.approx(3 * (4 * 3 * 2 * 5 * 48))  # three ranks more


def test_unseen_clients_of_each_budget_have_an_accuracy(simulate: Simulate) -> None:
    simulation = simulate("flexlora", unseen=3, sizes=[12, 9, 12, 5, 8, 7, 6], **BUDGETS)
    summary = simulation.run()
    each = summary["per_client"]
    for name in ("zero_leaf", "leaf"):
        known = dict(zip(each["unseen_ids"], each[f"unseen_{name}"], strict=True))
        for number, group in enumerate(summary["budgets"]):
            own = [value for client, value in known.items() if simulation.budgets.group[client] == number]
            assert group["unseen"][name] == pytest.approx(sum(own) / len(own))


def test_what_is_held_of_each_tier_is_told_beside_the_budget(simulate: Simulate) -> None:
    large, small = simulate("hilora", **{**BUDGETS, "rank": [2, 4, 3], "rounds": [1, 1, 1]}).run()["budgets"]
    assert (large["ranks"], large["held"]) == (4, {"root": 2, "cluster": 4, "leaf": 3})
    assert (small["ranks"], small["held"]) == (1, {"root": 1, "cluster": 1, "leaf": 1})
    adapter, head = 4 * 2 * 24, 6 * 24 + 6  # q and v of two blocks, A and B of a rank
    assert (large["parameters"], small["parameters"]) == (4 * adapter + head, adapter + head)


@pytest.mark.parametrize(("name", "budgets"), [("fslora", {"rank_budgets": 1}), ("fedit", {})])
def test_all_with_one_budget_train_as_much_as_all_with_that_rank(
    simulate: Simulate, name: str, budgets: dict[str, int]
) -> None:
    summary = simulate(name, rounds=[1, 0, 0], rank=2 if budgets else 1, **budgets).run()
    assert summary["trained_parameters"] == 4 * 2 * 24 + 6 * 24 + 6


@pytest.mark.parametrize("name", ["fed-hello", "fedra"])
def test_blocks_that_are_not_trained_count_for_no_parameters(simulate: Simulate, name: str) -> None:
    summary = simulate(name, rounds=[1, 0, 0], layer_budgets="1/2:2,1/2:1").run()
    block, head = 2 * 2 * 2 * 24, 6 * 24 + 6
    assert [group["parameters"] for group in summary["budgets"]] == [2 * block + head, block + head]
    alone = simulate(name, rounds=[1, 0, 0], layer_budgets=1).run()
    assert alone["trained_parameters"] == block + head


def test_probes_count_beside_the_images_of_the_rounds(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    how = {**BUDGETS, "local_epochs": 1, "participation": 1.0, "rounds": [1, 1, 0]}
    (_, root) = simulate("hilora", **{**how, "rounds": [1, 0, 0]}).run()["budgets"]
    image = root["flops"] / (1 + 3)  # a round, and three epochs of probing
    (_, small) = simulate("hilora", **how).run()["budgets"]
    monkeypatch.setattr(HiLoRA, "probe_epochs", 5)
    (_, probed_more) = simulate("hilora", **how).run()["budgets"]
    assert probed_more["flops"] - small["flops"] == pytest.approx(2 * image / 2)  # two epochs over two rounds
    assert probed_more["parameters"] == small["parameters"]


def test_images_of_the_fisher_information_count_beside_those_of_the_rounds(simulate: Simulate) -> None:
    how: dict[str, Any] = {"rounds": [1, 0, 0], "layer_budgets": "1/2:2,1/2:1", "sizes": [8] * 5, "fisher_images": 4}
    (large, _) = simulate("fed-hello", **how).run()["budgets"]
    (measured, _) = simulate("fed-hello", allocation="fisher", **how).run()["budgets"]
    assert measured["flops"] == pytest.approx(large["flops"] * (8 + 4) / 8)


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
