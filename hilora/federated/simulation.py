"""The loop of a federated training: stages, rounds, and the clients that take part in them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.io.files import checksum
from hilora.federated.callbacks.base import Callback, Round
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
from hilora.federated.protocol import Stage
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy
from hilora.federated.streams import stream
from hilora.locks import uninterrupted
from hilora.models.backbone import Backbone
from hilora.reporting.summary import PHASES, SCHEMA

log = logging.getLogger(__name__)
PROGRESS = ("round", "stage", "round_in_stage", "trained", "images", "trained_parameters", "finished")


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
        super().__init__(strategy, settings, backbone, train, test, population, device, dtype)
        self.out, self.arguments = out, dict(arguments or {})
        self.round, self.trained = 0, list[int]()  # rounds so far; in each stage that is over
        self.images, self.trained_parameters, self.finished = 0, 0, False
        self.phases = dict.fromkeys(PHASES, 0.0)  # seconds
        measures = [Metrics(), Diagnostics(), BudgetGroups(), UnseenClients()]
        self.callbacks = [*measures, *callbacks, ProgressBar(), Report(), Checkpoint()]
        self._weights = checksum("", backbone.model.state_dict())
        images = {"train": train.checksums(), "test": test.checksums()}
        self._data = checksum("", {**images, "train labels": train.labels, "test labels": test.labels})
        self._shares = checksum("", _shares(population))
        out.mkdir(parents=True, exist_ok=True)
        if resume:
            restore(self)
        else:
            self._save()

    @property
    def seconds(self) -> float:
        """What the run has taken, but for its writing."""
        return sum(self.phases.values()) - self.phases["write"]

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """What is done inside of the block belongs to a phase."""
        started = time.perf_counter()
        yield
        self.phases[phase] += time.perf_counter() - started

    def run(self) -> dict[str, Any]:
        """Train to the end; returns the summary. What was reached is on disk also when this is interrupted.

        Raises:
            KeyboardInterrupt: after the results so far have been written.
        """
        try:
            self._tell("begin")
            while self.stage < len(self.stages):
                self._stage(self.stages[self.stage])
            if not self.finished:
                with self._timed("evaluate"):
                    self._tell("trained")
                self.finished = True
                self._save()
        except BaseException as ended:
            try:
                with uninterrupted():
                    restore(self)  # back to the last round that counts
                    self._end()
            except Exception as error:  # what ended the run is what is raised
                ended.add_note(f"what was reached could not be written: {error}")
            raise
        with uninterrupted():
            self._end()
        return self.summary()

    def _tell(self, hook: str, *what: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *what)

    def _end(self) -> None:
        """Every callback has its end, whatever happens in another's; the first error is raised afterwards."""
        errors = []
        for callback in self.callbacks:
            try:
                callback.end(self)
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _save(self) -> None:
        with self._timed("write"):
            self._tell("saved")

    def _stage(self, stage: Stage) -> None:
        """The rounds of a stage, or what is left of them."""
        number = self.stage
        if self.round_in_stage == 0:
            with self._timed("group"):
                self.server.begin(stage, self.population.seen, self.asks("probe"))
            self._tell("stage_begun", stage)
        if stage.rounds == 0:
            self.stage, self.trained = self.stage + 1, [*self.trained, 0]
            self._save()
        while self.stage == number:
            self._round(stage)

    def _round(self, stage: Stage) -> None:
        before = self.seconds
        with self._timed("train"):
            clients = self._sample(self.population.seen, stage)
            trainer = self.trainer(clients, "training", self.round + 1)
            upload = self.exchange(trainer, self.server.configure(stage, clients).at(self.round_in_stage + 1))
            noted = self.server.aggregate(stage, upload)
        stops = bool(noted.pop("stop", False))
        self.round_in_stage += 1
        record = {
            "round": self.round + 1,
            "stage": stage.tier,
            "round_in_stage": self.round_in_stage,
            "loss": _mean(trainer.losses),
            "clients": len(clients),
            "images": trainer.images,
            **({"skipped": trainer.skipped} if trainer.skipped else {}),
            **self.reception.note(),
            **self.moved(),
            **noted,
        }
        round = Round(stage, stops or self.round_in_stage >= stage.rounds, record, trainer.work)
        with self._timed("evaluate"):
            self._tell("measure", round)
        record["seconds"] = self.seconds - before
        with uninterrupted():
            self.round += 1
            self.images += trainer.images
            self.trained_parameters = max(self.trained_parameters, trainer.parameters)
            if round.last:
                self.trained = [*self.trained, self.round_in_stage]
                self.stage, self.round_in_stage = self.stage + 1, 0
            with self._timed("write"):
                self._tell("commit", round)
            self._save()
        if stops:
            log.info("%s: %s stops early, %s", self.name, stage.tier, noted)

    def _sample(self, seen: Tensor, stage: Stage) -> Tensor:
        """The clients of the next round: a share of them, or all where nothing travels and each trains alone."""
        count = max(1, round(self.settings.participation * len(seen)))
        if stage.private or not self.server.travels or count == len(seen):
            return seen
        order = torch.randperm(len(seen), generator=stream(self.settings.seed, "sampling", self.round + 1))
        return seen[order[:count].sort().values]

    def summary(self) -> dict[str, Any]:
        """What `summary.json` says; accuracies are fractions of 1."""
        found: dict[str, Any] = {
            "schema": SCHEMA,
            "strategy": self.name,
            "partition": self.population.scheme,
            "seed": self.settings.seed,
            "data": self.train_images.name,
            "backbone": self.backbone.name,
            "dtype": str(self.engine.dtype).removeprefix("torch."),
            "communication": self.communication(self.round),
            "trained_parameters": self.trained_parameters,
            "images": self.images,
            "clusters": self.clusters(),
            "seconds": self.seconds,
            "seconds_by_phase": dict(self.phases),
            "images_per_second": self.images / self.phases["train"] if self.phases["train"] else None,
            "interrupted": not self.finished,
            "rounds": self.round,
            "config": {**self.settings.plain(), **self.server.settings.plain()},
            "arguments": self.arguments,
            **self.reception.summary(),
        }
        for callback in self.callbacks:
            for key, value in callback.summary(self).items():
                found[key] = {**found[key], **value} if key in found else value
        return found

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
        """Where the run stands."""
        return {
            **{name: getattr(self, name) for name in PROGRESS},
            "asked": [stage.rounds for stage in self.stages],
            "seconds_by_phase": self.phases,
            "strategy": self.server.state_dict(),
            "store": self.store.state_dict(),
            "post": self.post.state_dict(),
            "reception": self.reception.state_dict(),
            "callbacks": {one.name: one.state_dict() for one in self.callbacks},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`.

        Raises:
            KeyError, TypeError: it lacks something, or has something else in its place.
        """
        for name in PROGRESS:
            if type(state[name]) is not type(getattr(self, name)):
                raise TypeError(f"{name} is {state[name]!r}")
            setattr(self, name, state[name])
        self.phases = {phase: state["seconds_by_phase"][phase] for phase in PHASES}
        self.server.load_state_dict(state["strategy"])
        self.store.load_state_dict(state["store"])
        self.post.load_state_dict(state["post"])
        self.reception.load_state_dict(state.get("reception", {}))
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))


def _shares(population: Population) -> dict[str, Tensor]:
    """Which images each client has, and whether it is seen."""
    shares = {"seen": population.seen}
    for number, client in enumerate(population.clients):
        shares |= {f"{number}.{split}": getattr(client, split) for split in ("train", "val", "test")}
    return shares


def _mean(losses: Sequence[Tensor]) -> float | None:
    known = torch.cat([torch.empty(0), *(loss[~loss.isnan()] for loss in losses)])
    return float(known.mean()) if len(known) else None
