"""The strategies on Flower's deployment engine: three SuperNodes, TLS, a proxy that records what they send."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.federated.deploy.loopback import loopback, until
from tests.federated.deploy.network import CLIENTS, Network
from tests.federated.deploy.recorder import recorder
from tests.federated.deploy.test_server import close

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("deployment")]

STRATEGIES = ("hilora", "flexlora", "fedsa-lora", "ifca", "fedalt")
"""Three tiers and groups; means of products; private parts; a choice of several; a gate that stays."""


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    with loopback(folder) as link, recorder(link.certificates, link.port) as record:
        network = Network(link, record, folder)
        done: dict[str, str] = {}
        network.run = cache(lambda name: _run(network, name))
        yield network


def _run(network: Network, name: str) -> str:
    return network.link.run(network.app(name, strategy=name), {})


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_deployment_gives_the_numbers_of_a_simulation(network: Network, name: str) -> None:
    said = network.run(name)
    print(said)
    simulation = network.simulation(name, strategy=name)
    expected = simulation.run()
    summary = network.summary(name)
    close(network.checkpoint(name)["strategy"], simulation.server.state_dict())
    assert summary["per_client"]["test"] == pytest.approx(expected["per_client"]["test"], nan_ok=True)
    for client in range(CLIENTS):
        kept = network.private(name, client).store
        for table, rows in simulation.store.tables.items():
            close(kept.tables[table], rows.rows(torch.tensor([client])))
