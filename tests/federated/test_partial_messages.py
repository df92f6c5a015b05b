"""Messages of some ranks and some projections: whether they are taken, and what they say that a client changed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from hilora.federated.protocol import Download, Upload
from hilora.federated.strategies import STRATEGIES
from hilora.federated.sums import changes
from hilora.federated.vetting import layout, vet
from tests.federated.conftest import Simulate

BUDGETS: dict[str, dict[str, Any]] = {
    "flexlora": {"rank_budgets": "1/2:2,1/2:1"},
    "hetlora": {"rank_budgets": "1/2:2,1/2:1", "prune_decay": 0.5},
    "fslora": {"rank_budgets": "1/2:2,1/2:1"},
    "flora": {"rank_budgets": "1/2:2,1/2:1"},
    "sdflora": {"rank_budgets": "1/2:2,1/2:1"},
    "fed-hello": {"layer_budgets": "1/2:2,1/2:1", "allocation": "fisher"},
    "fedra": {"layer_budgets": "1/2:2,1/2:1"},
}


def message(simulate: Simulate, name: str) -> tuple[Any, Download, Upload]:
    """A simulation, what clients were sent and what they sent back."""
    simulation = simulate(name, **BUDGETS[name])
    clients = simulation.population.seen
    download = simulation.server.configure(simulation.current, clients).at(1)
    state, trainer = simulation.store.of(clients), simulation.trainer(clients, "training", 1)
    return simulation, download, simulation.client.local(state, download, trainer)


@pytest.mark.parametrize("name", BUDGETS)
def test_they_pass_vetting_and_say_what_was_changed_alone(simulate: Simulate, name: str) -> None:
    simulation, download, upload = message(simulate, name)
    expected = simulation.server.expected(download.stage)
    assert vet(upload, expected, download, bound=1e3) == [None] * 5
    ((tier, table),) = upload.tiers.items()
    changed = changes(upload, download)
    ranks = torch.arange(2) < table.rank[:, None]  # [n, r]
    lacking = ~ranks[:, None, None, :].expand_as(changed[f"{tier}.0.lora_B"])
    if table.has:
        lacking = lacking | ~table.has[0][..., None, None]
    assert lacking.any()
    assert not changed[f"{tier}.0.lora_B"][lacking].any()
    assert not changed[f"{tier}.0.lora_A"].mT[~(~lacking[:, :, :1]).expand(-1, -1, 24, -1)].any()
    assert ("head.weight" in changed) == (name != "sdflora")  # whose heads are private
    assert changed.get("head.weight", table.B[0]).any()


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) & {"fedit", "flexlora", "hetlora"}))
def test_a_method_whose_clients_send_all_projections_takes_no_part_of_them(simulate: Simulate, name: str) -> None:
    simulation, download, upload = message(simulate, "fedra")
    other = simulate(name, out=simulation.out.parent / name)
    said = layout(upload, other.server.expected(download.stage))
    assert said is not None
    assert said.startswith("root has 0.lora_A, 0.lora_B, 0.has, rank, expected 0.lora_A, 0.lora_B, rank")


def test_scores_that_are_none_are_left_out(simulate: Simulate) -> None:
    simulation, download, upload = message(simulate, "fed-hello")
    expected = simulation.server.expected(download.stage)
    assert upload.scores is not None
    scores = upload.scores.clone()
    scores[1, 0], scores[2, 1], scores[3, 0] = -1, torch.nan, torch.inf
    found = vet(replace(upload, scores=scores), expected)
    assert [reason is None for reason in found] == [True, False, False, False, True]
    assert found[1] == "scores that are no numbers of at least 0"
    assert layout(replace(upload, scores=None), expected) == "it has no scores, expected some"
    wide = layout(replace(upload, scores=torch.zeros(5, 7)), expected)
    assert wide == "scores is torch.float32 [5, 7], expected torch.float32 [5, 2]"
    assert upload.rows(torch.tensor([1, 2])).scores is not None
