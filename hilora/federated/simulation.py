"""A federated training on one machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.io.files import checksum
from hilora.federated.callbacks.base import Callback
from hilora.federated.callbacks.budgets import BudgetGroups
from hilora.federated.callbacks.checkpoint import Checkpoint, restore
from hilora.federated.callbacks.diagnostics import Diagnostics
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.callbacks.progress import ProgressBar
from hilora.federated.callbacks.report import Report
from hilora.federated.callbacks.unseen import UnseenClients
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population
from hilora.federated.federation import Federation
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy
from hilora.models.backbone import Backbone


class Simulation(Federation):
    """The training of one strategy on one population.

    Args:
        strategy: a name, a class, or a strategy with settings of its own.
        settings: how to train.
        backbone: the frozen ViT.
        train: images of all clients' training and validation; `test` those of their tests.
        population: who has which of them.
        out: folder for the results.
        device: where to compute.
        dtype: of the backbone.
        resume: go on from the checkpoint in `out`.
        arguments: how the run was asked for, to stand in the summary.
        callbacks: more than those that every run has.

    Raises:
        InvalidValueError: for an unknown strategy, or a population that has nothing to train on.
        MissingFileError: if there is no checkpoint to resume from; FileError: if it is of another run.
    """

    def __init__(
        self,
        strategy: str | type[Strategy] | Strategy,
        settings: TrainingSettings,
        backbone: Backbone,
        train: ImageSet,
        test: ImageSet,
        population: Population,
        out: Path,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        resume: bool = False,
        arguments: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        measures = [Metrics(), Diagnostics(), BudgetGroups(), UnseenClients()]
        usual = [*measures, *callbacks, ProgressBar(), Report(), Checkpoint()]
        super().__init__(strategy, settings, backbone, train, test, population, device, dtype, out, usual)
        self.arguments = dict(arguments or {})
        self._weights = checksum("", backbone.model.state_dict())
        images = {"train": train.checksums(), "test": test.checksums()}
        self._data = checksum("", {**images, "train labels": train.labels, "test labels": test.labels})
        self._shares = checksum("", _shares(population))
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            restore(self)
        else:
            self._save()

    def summary(self) -> dict[str, Any]:
        return {
            **super().summary(),
            "partition": self.population.scheme,
            "data": self.train_images.name,
            "backbone": self.backbone.name,
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "clusters": self.clusters(),
            "arguments": self.arguments,
        }

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this run."""
        settings = self.settings.plain()
        del settings["clients_at_once"]
        clients = self.population.clients
        return {
            **settings,
            **{f"{self.name}.{name}": value for name, value in self.server.settings.plain().items()},
            "strategy": self.name,
            "data": [self.train_images.name, self._data],
            "backbone": [self.backbone.name, self.backbone.size, self._weights],
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "partition": self.population.scheme,
            "clients": [len(clients), sum(client.seen for client in clients), self._shares],
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "store": self.store.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.store.load_state_dict(state["store"])


def _shares(population: Population) -> dict[str, Tensor]:
    """Which images each client has, and whether it is seen."""
    shares = {"seen": population.seen}
    for number, client in enumerate(population.clients):
        shares |= {f"{number}.{split}": getattr(client, split) for split in ("train", "val", "test")}
    return shares
