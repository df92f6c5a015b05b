"""A deployment of four clients in this process, on the squares and the tiny ViT of the simulation's tests."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context
from flwr.supercore.task_identity import TaskIdentity

from hilora.federated.callbacks.report import Report
from hilora.federated.data.partitions import partition
from hilora.federated.deploy import flower
from hilora.federated.deploy.flower import GridCourier, client_app
from hilora.federated.deploy.server import Deployment
from hilora.federated.deploy.settings import asked
from hilora.federated.simulation import Simulation
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, records, squares
from tests.federated.deploy.grid import Grid, Node
from tests.federated.deploy.rounding import steady

CLIENTS = 4
CONFIG: dict[str, Any] = {
    "clients": CLIENTS,
    "classes": str(CLASSES),
    "backbone": "tiny",
    "partition": "sc-dir",
    "images-per-client": 10,
    "test-images": 7,
    "rounds": "2,2,1",
    "batch-size": 4,
    "rank": 2,
    "deadline": 0.05,
    "wait": 5.0,
}


def images() -> tuple[Any, Any]:
    return squares(360, 1), squares(90, 2)


class World:
    """The nodes, the grid between them and the server, and the server's settings."""

    def __init__(self, out: Path, backbone: Backbone, state: Path | None = None, **config: Any) -> None:
        given = {name.replace("_", "-"): value for name, value in config.items()}
        self.backbone, self.out = backbone, out
        self.config = {**CONFIG, "out": str(out), **given}
        self.state = state
        self.nodes = [self.node(100 + client, client) for client in range(CLIENTS)]
        self.grid = Grid(self.nodes)

    def node(self, number: int, client: int) -> Node:
        """A node of a number that says that it is a client."""

        def read(context: Context) -> tuple[Any, Any]:
            return images()

        config = {"client-id": client, **({"state-dir": str(self.state)} if self.state else {})}
        return Node(number, lambda: client_app(read), config, self.config)

    def deployment(self, **config: Any) -> Deployment:
        """The server, with some settings changed."""
        given = {name.replace("_", "-"): value for name, value in config.items()}
        courier: Any = GridCourier(self.grid)
        return Deployment(asked({**self.config, **given}), self.backbone, courier, poll=0.0)

    def run(self, **config: Any) -> Deployment:
        """Train to the end; `last` is the server, and `records` what its metrics say, also after an error."""
        self.last = self.deployment(**config)
        self.last.run()
        return self.last

    @property
    def records(self) -> list[dict[str, Any]]:
        return records(self.last)

    def simulation(self, out: Path) -> Simulation:
        """The same training on one machine, without pictures."""
        what = asked(self.config)
        assert what.partition is not None
        train, test = images()
        people = partition(train, test, what.partition, seed=what.training.seed)
        cpu = torch.device("cpu")
        found = Simulation(what.strategy, what.training, self.backbone, train, test, people, out, cpu)
        found.callbacks = [callback for callback in found.callbacks if not isinstance(callback, Report)]
        return found


Make = Callable[..., World]


@pytest.fixture
def world(tmp_path: Path, backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes a `World`; its options are settings of the run."""
    monkeypatch.setattr(flower, "load_backbone", lambda *_: backbone)
    steady(monkeypatch)
    for name, value in {"_run_id": 1, "_node_id": 1, "_task_id": 1}.items():
        monkeypatch.setattr(TaskIdentity, name, value)

    numbers = itertools.count()

    def make(**options: Any) -> World:
        return World(tmp_path / f"deployed-{next(numbers)}", backbone, **options)

    return make
