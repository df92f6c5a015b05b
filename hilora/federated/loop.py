"""The loop of a federated training: stages, rounds, and the clients that take part in them, wherever these are."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.callbacks.checkpoint import restore
from hilora.federated.engine.post import Post
from hilora.federated.engine.trainer import Effort
from hilora.federated.protocol import Download, Stage, Upload
from hilora.federated.reception import Reception
from hilora.federated.strategies.base import Ask, Strategy
from hilora.federated.streams import stream
from hilora.locks import uninterrupted
from hilora.reporting.summary import PHASES, SCHEMA

log = logging.getLogger(__name__)
PROGRESS = ("round", "stage", "round_in_stage", "trained", "images", "trained_parameters", "finished")


class Work(NamedTuple):
    """What clients did with a download.

    Attributes:
        upload: what they sent back; those that sent nothing of use are not in it.
        images: how many they trained on.
        loss: the mean over those for which it is known.
        parameters: how many numbers a client trained at most; 0 where that is not known.
        efforts: what the trainings were, where that is known.
        notes: what else the round's record says.
    """

    upload: Upload
    images: int
    loss: float | None = None
    parameters: int = 0
    efforts: Sequence[Effort] = ()
    notes: Mapping[str, Any] = {}


class Loop(ABC):
    """The server's half of a strategy, led through its stages and rounds.

    Attributes:
        server: the server's half.
        out: folder for the results.
        post: what was moved.
        reception: what is done with messages before the server's half has them.
        probes: what clients have trained outside of rounds since a stage began, where that is known.
        noise_seed: of the noise of differential privacy; None for the training's seed.
        stages: of the strategy; `stage` is the number of the one that is trained.
        round_in_stage: rounds of it that are done; `round` of all stages; `trained` of each stage that is over.
        phases: seconds of each phase.
    """

    noise_seed: int | None = None

    def __init__(self, server: Strategy, out: Path, callbacks: Sequence[Callback]) -> None:
        self.server, self.out = server, out
        self.callbacks: list[Any] = list(callbacks)  # some want a loop of a certain kind
        self.name, self.settings = server.name or type(server).__name__, server.training
        server.start()
        self.stages = server.stages()
        self.stage, self.round_in_stage = 0, 0
        self.round, self.trained = 0, list[int]()
        self.images, self.trained_parameters, self.finished = 0, 0, False
        self.phases = dict.fromkeys(PHASES, 0.0)
        self.post, self.probes = Post(server.problem.clients), list[Effort]()
        self.reception = Reception(server, self.noise_seed)

    @property
    @abstractmethod
    def seen(self) -> Tensor:
        """Int64 ids of the clients that take part in the training, ascending."""

    @abstractmethod
    def work(self, clients: Tensor, download: Download, purpose: str, round: int = 0) -> Work:
        """Send clients `[n]` a download; they work, and send something back. `round` is its number in the run."""

    @property
    @abstractmethod
    def unseen(self) -> Tensor:
        """Int64 ids of the clients that come after the training, ascending."""

    @abstractmethod
    def accuracies(self, clients: Tensor, personal: bool = False) -> dict[str, Tensor]:
        """Shares of right answers of clients `[n]` on their validation and test images, `[n]`: `val` and `test`. If
        `personal`, the clients are unseen, and train by themselves first."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be of this run."""

    def communication(self, rounds: int) -> dict[str, Any]:
        """Bytes that a seen client sent and was sent, on the mean of so many rounds, and each client in all."""
        mean = {way: moved / max(rounds, 1) for way, moved in self.moved().items()}
        return {**mean, "per_client": {"up": self.post.up.tolist(), "down": self.post.down.tolist()}}

    def moved(self) -> dict[str, float]:
        """Bytes that a seen client has sent and been sent so far, on the mean."""
        up, down = (float(bytes[self.seen].double().mean()) for bytes in (self.post.up, self.post.down))
        return {"up": up, "down": down}

    @property
    def current(self) -> Stage:
        """The stage that is trained; after the last one, that."""
        return self.stages[min(self.stage, len(self.stages) - 1)]

    def configured(self, clients: Tensor) -> Download:
        """What the server has for clients now."""
        return self.server.serve(self.current, clients).at(self.round_in_stage + 1)

    def asks(self, purpose: str) -> Ask:
        """What a strategy can ask clients by, outside of rounds."""

        def ask(clients: Tensor, download: Download) -> Upload:
            work = self.work(clients, download, purpose)
            self.probes.extend(work.efforts)
            return work.upload

        return ask

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
                self.probes.clear()
                self.server.begin(stage, self.seen, self.asks("probe"))
            self._tell("stage_begun", stage)
        if stage.rounds == 0:
            self.stage, self.trained = self.stage + 1, [*self.trained, 0]
            self._save()
        while self.stage == number:
            self._round(stage)

    def _round(self, stage: Stage) -> None:
        before = self.seconds
        with self._timed("train"):
            clients = self._sample(self.seen, stage)
            download = self.server.configure(stage, clients).at(self.round_in_stage + 1)
            work = self.work(clients, download, "training", self.round + 1)
            noted = self.server.aggregate(stage, work.upload)
        stops = bool(noted.pop("stop", False))
        self.round_in_stage += 1
        record = {
            "round": self.round + 1,
            "stage": stage.tier,
            "round_in_stage": self.round_in_stage,
            "loss": work.loss,
            "clients": len(clients) - len(work.notes.get("left_out", {})),
            "images": work.images,
            **self.reception.note(),
            **work.notes,
            **self.moved(),
            **noted,
        }
        round = Round(stage, stops or self.round_in_stage >= stage.rounds, record, work.efforts)
        with self._timed("evaluate"):
            self._tell("measure", round)
        record["seconds"] = self.seconds - before
        with uninterrupted():
            self.round += 1
            self.images += work.images
            self.trained_parameters = max(self.trained_parameters, work.parameters)
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
            "seed": self.settings.seed,
            "communication": self.communication(self.round),
            "trained_parameters": self.trained_parameters,
            "images": self.images,
            "seconds": self.seconds,
            "seconds_by_phase": dict(self.phases),
            "images_per_second": self.images / self.phases["train"] if self.phases["train"] else None,
            "interrupted": not self.finished,
            "rounds": self.round,
            "config": {**self.settings.plain(), **self.server.settings.plain()},
            **self.reception.summary(),
        }
        for callback in self.callbacks:
            for key, value in callback.summary(self).items():
                found[key] = {**found[key], **value} if key in found else value
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where the run stands."""
        return {
            **{name: getattr(self, name) for name in PROGRESS},
            "asked": [stage.rounds for stage in self.stages],
            "seconds_by_phase": self.phases,
            "strategy": self.server.state_dict(),
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
        self.post.load_state_dict(state["post"])
        self.reception.load_state_dict(state.get("reception", {}))
        for callback in self.callbacks:
            callback.load_state_dict(state["callbacks"].get(callback.name, {}))
