"""The seam: what the server never sees, what the clients' half never sees, and what the messages between them weigh."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import Stack
from hilora.federated.federation import Federation
from hilora.federated.protocol import Upload
from hilora.federated.strategies import STRATEGIES
from tests.federated.conftest import Simulate, copied, records, same

pytestmark = pytest.mark.slow

METHODS = list(STRATEGIES)
PRIVATE = {  # what the clients of a method keep, and its server never has
    "hilora": {"leaf", "head"},
    "head-only": {"head"},
    "local-lora": {"leaf", "head"},
    "fedsa-lora": {"leaf", "head"},
    "fdlora": {"leaf", "head", "weights"},
    "feddpa-f": {"leaf", "head", "references", "trained"},
    "feddpa-t": {"leaf", "head", "references", "trained"},
    "pf2lora": {"leaf", "head"},
    "fedalt": {"gate", "head"},
    "ifca": {"choice"},
    "fedopal": {"leaf", "head"},
    "sdflora": {"leaf", "gains", "head"},
    "fedlease": {"router", "head"},
    "fedtreelora": {"shares", "head"},
    **{name: set() for name in ("fedit", "flexlora", "ffa-lora", "central", "lora-fair", "rolora", "flora")},
    **{name: set() for name in ("hetlora", "fslora", "fed-hello", "fedra")},
}
SENT = {"fedalt": {"leaf"}, "fedlease": {"warm"}, "fedtreelora": {"warm"}}  # kept, and sent as well


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of a state, with the names that lead to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Stack):
        yield from tensors(value.tensors(), name)
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from tensors(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from tensors(inner, f"{name}.{index}")


@pytest.mark.parametrize("name", METHODS)
def test_the_server_never_has_what_is_private(simulate: Simulate, name: str) -> None:
    simulation = simulate(name)
    simulation.run()
    kept = simulation.store.tables
    assert set(kept) - SENT.get(name, set()) == PRIVATE[name]
    state = dict(tensors(simulation.server.state_dict()))
    assert not any("leaf" in key or "gate" in key for key in state)
    compared = 0
    for private in PRIVATE[name]:
        for key, table in kept[private].tensors().items():
            rows = table[simulation.population.seen]  # an unseen client begins with copies of what it was sent
            for mine in rows if rows.is_floating_point() else ():
                if mine.any() and mine.numel() > 4:
                    compared += 1
                    for where, held in state.items():
                        found = held.shape[-mine.dim() :] == mine.shape and held.dtype == mine.dtype
                        assert not (found and (held == mine).flatten(-mine.dim()).all(-1).any()), (private, key, where)
    assert compared or not PRIVATE[name] or name == "ifca"


@pytest.mark.parametrize("name", METHODS)
def test_the_clients_half_has_nothing_but_settings_and_the_problem(simulate: Simulate, name: str) -> None:
    simulation = simulate(name, rounds=[1, 1, 1])
    before = dict(vars(simulation.client))
    assert not set(before) & set(simulation.server.state_dict())
    simulation.run()
    after = vars(simulation.client)
    assert after.keys() == before.keys()
    assert all(after[key] is before[key] for key in before)


@pytest.mark.parametrize("name", METHODS)
def test_to_predict_moves_nothing_and_tells_the_server_nothing(simulate: Simulate, name: str) -> None:
    simulation = simulate(name, rounds=[1, 1, 1])
    simulation.run()
    moved = simulation.post.up.clone(), simulation.post.down.clone()
    before = {key: value.clone() for key, value in tensors(simulation.server.state_dict())}
    everyone = torch.arange(6)
    one, other = (simulation.models(everyone) for _ in range(2))
    assert same(one.head.taken(), other.head.taken())
    after = dict(tensors(simulation.server.state_dict()))
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(simulation.post.up, moved[0])
    assert torch.equal(simulation.post.down, moved[1])


A = B = 4 * 4 * 2 * 24  # bytes: four projections at rank 2, width 24
HEAD = 4 * (6 * 24 + 6)
ALL = A + B + HEAD
# bytes of a seen client up and down in all six rounds, and of an unseen one, which trains by itself in the end
TRAFFIC = {
    "fedit": (6 * ALL, 6 * ALL, 0, ALL),
    "flexlora": (6 * ALL, 6 * ALL, 0, ALL),
    "ffa-lora": (6 * (B + HEAD), A + 6 * (B + HEAD), 0, ALL),  # A once
    "fedsa-lora": (6 * A, 6 * A, 0, A),
    "lora-fair": (6 * ALL, 6 * ALL, 0, ALL),
    "rolora": (3 * (A + B) + 6 * HEAD, ALL + 3 * B + 2 * A + 5 * HEAD, 0, ALL),  # a factor in turn, B first
    "fedopal": (6 * (A + B), 6 * (A + B), 0, A + B),
    "sdflora": (6 * (A + B), 6 * (A + B), 0, A + B),
    "pf2lora": (6 * (A + B), 6 * (A + B), 0, A + B),
    "fedalt": (6 * (A + B), 6 * (A + B), 0, A + B),
    "feddpa-t": (6 * ALL, 6 * ALL, 0, ALL),
    "feddpa-f": (5 * ALL, 6 * ALL, 0, ALL),  # the leaf starts from the last global one, which is sent
    "local-lora": (0, 0, 0, 0),
    "central": (0, 0, 0, 0),
    # Three rounds alone, a first upload for the mean, two rounds of the shared one, and it is sent to be fused.
    "fdlora": ((1 + 2) * ALL, (2 + 1) * ALL, 0, ALL),
    # The root three times and as the clusters found it, the cluster's adapter and head twice and as the leaf finds it.
    # An unseen client is probed: it gets the root and sends its own back, without a head.
    "hilora": (5 * ALL, 3 * ALL + (A + B) + 3 * ALL, A + B, 2 * ALL),
    "head-only": (5 * HEAD, 6 * HEAD, HEAD, 2 * HEAD),
}


@pytest.mark.parametrize("name", list(TRAFFIC))
def test_traffic_is_what_was_moved(simulate: Simulate, name: str) -> None:
    simulation = simulate(name)
    summary = simulation.run()
    assert summary["rounds"] == 6
    up, down, unseen_up, unseen_down = TRAFFIC[name]
    moved = summary["communication"]
    assert moved["per_client"] == {"up": [up] * 5 + [unseen_up], "down": [down] * 5 + [unseen_down]}
    assert (moved["up"], moved["down"]) == (pytest.approx(up / 6), pytest.approx(down / 6))


def test_the_mirror_of_fedsa_sends_b_in_the_place_of_a(simulate: Simulate) -> None:
    simulation = simulate("fedsa-lora", shared_factor="B")
    assert simulation.run()["communication"]["per_client"] == {"up": [6 * B] * 5 + [0], "down": [6 * B] * 5 + [B]}
    assert set(simulation.store.tables["leaf"].tensors()) == {"0.lora_A", "rank"}


def test_ifca_sends_every_adapter_that_changed_and_takes_one_back(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulation = simulate("ifca", k=3)
    chosen: list[set[int]] = []
    aggregate = simulation.server.aggregate

    def noted(stage: Any, upload: Upload) -> dict[str, Any]:
        assert upload.choice is not None
        chosen.append(set(upload.choice.tolist()))
        return aggregate(stage, upload)

    monkeypatch.setattr(type(simulation.server), "aggregate", lambda _, *given: noted(*given))
    moved = simulation.run()["communication"]["per_client"]
    down = (3 + sum(len(groups) for groups in chosen[:-1])) * ALL  # all at first, then what others have trained
    assert moved["up"] == [6 * (ALL + 8)] * 5 + [0]
    assert moved["down"] == [down] * 5 + [3 * ALL]


@pytest.mark.parametrize("name", ["fedsa-lora", "pf2lora", "fedalt", "fedopal", "sdflora"])
def test_a_shared_head_is_moved_too(simulate: Simulate, name: str) -> None:
    moved = simulate(name, shared_head=True).run()["communication"]["per_client"]
    up, down, _, unseen = TRAFFIC[name]
    assert moved == {"up": [up + 6 * HEAD] * 5 + [0], "down": [down + 6 * HEAD] * 5 + [unseen + HEAD]}


def test_probes_of_the_training_are_counted(simulate: Simulate) -> None:
    """Half of the clients train the root; before the clusters are formed, those that did are probed from one root, and
    the others to be routed."""
    simulation = simulate("hilora", participation=0.4, rounds=[1, 0, 0])
    federation: Federation = simulation
    asked: list[list[int]] = []
    exchange = federation.exchange

    def noted(trainer: Any, download: Any) -> Upload:
        asked.append(trainer.clients.tolist())
        return exchange(trainer, download)

    simulation.exchange = noted  # type: ignore[method-assign]
    simulation.run()
    took_part, probed, routed, unseen = asked
    assert probed == took_part
    assert sorted(probed + routed) == [0, 1, 2, 3, 4]
    assert unseen == [5]
    up = simulation.post.up
    assert up[took_part].tolist() == [ALL + A + B] * 2
    assert up[routed].tolist() == [A + B] * 3


@pytest.mark.parametrize("name", METHODS)
def test_what_was_sent_is_not_written_to(simulate: Simulate, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the simulation messages are tables that both halves can see: neither half may change what it has sent."""
    simulation = simulate(name, rounds=[2, 1, 1])
    local, aggregate = simulation.client.local, simulation.server.aggregate

    def careful(state: Any, download: Any, trainer: Any) -> Upload:
        before = {tier: copied(rows.table) for tier, rows in download.tiers.items()}
        upload = local(state, download, trainer)
        assert all(same(download.tiers[tier].table, table) for tier, table in before.items())
        return upload

    def checked(stage: Any, upload: Upload) -> dict[str, Any]:
        before = {tier: copied(table) for tier, table in upload.tiers.items()}
        private = {key: value.clone() for key, value in tensors(dict(simulation.store.tables))}
        found = aggregate(stage, upload)
        assert all(same(upload.tiers[tier], table) for tier, table in before.items())
        for key, value in tensors(dict(simulation.store.tables)):
            assert torch.equal(value, private[key]), key
        return found

    monkeypatch.setattr(type(simulation.client), "local", lambda _, *given: careful(*given))
    monkeypatch.setattr(type(simulation.server), "aggregate", lambda _, *given: checked(*given))
    simulation.run()
    assert len(records(simulation)) == 4
