"""What a worker of a cluster does: it trains one run at a time, for as long as somebody waits for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock

import distributed
import torch

from hilora.errors import InvalidValueError
from hilora.experiments.experiment import Model, Setting
from hilora.experiments.inputs import Inputs, check_files
from hilora.experiments.plan import Job
from hilora.experiments.records import Line
from hilora.experiments.training import Training, folder
from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.engine.device import find_device
from hilora.federated.simulation import Simulation
from hilora.locks import claimed
from hilora.models.backbone import tune_for_cpu
from hilora.version import __version__

_ONE_AT_A_TIME = Lock()  # a worker's threads are those of a run, not as many runs


@dataclass(frozen=True)
class Place:
    """Where runs find what they need, the same on every worker.

    Attributes:
        model: the backbone.
        root: the folder of data and weights.
        work: the scratch folder.
        device: by name; None for a GPU where there is one.
    """

    model: Model
    root: Path
    work: Path
    device: str | None


class Unwanted(Exception):
    """Nobody waits for the run any more."""


class Listening(Callback):
    """Ends a run after a round once nobody waits for it: the command was stopped, or is gone."""

    name = "listening"

    def measure(self, simulation: Simulation, round: Round) -> None:
        worker = distributed.get_worker()
        task = worker.state.tasks.get(worker.get_current_task())
        if task is None or task.state == "cancelled":
            raise Unwanted


def train(place: Place, job: Job, dtype: str | None) -> Line | None:
    """The line of a run, or what is left of it; None where another process is at it."""
    with _ONE_AT_A_TIME:
        torch.set_num_threads(distributed.get_worker().state.nthreads)  # of this thread alone
        training = _training(place)
        with claimed(folder(place.work, job)) as ours:
            return training.train(job, dtype) if ours else None


def quick(place: Place) -> str:
    """The arithmetic that is quick here."""
    return str(_training(place).inputs.dtype).removeprefix("torch.")


def check(place: Place, settings: Sequence[Setting], version: str) -> None:
    """Sees that runs can be trained here.

    Raises:
        MissingFileError: the data or the weights are not here.
        InvalidValueError: the device is not, or the library is another version.
    """
    if version != __version__:
        raise InvalidValueError(f"it has hilora {__version__}, expected {version}, as where the command was given")
    check_files(place.model, settings, place.root)
    find_device(place.device)


@lru_cache(maxsize=1)
def _training(place: Place) -> Training:
    device = find_device(place.device)
    if device.type == "cpu":
        tune_for_cpu()
    say = partial(distributed.print, flush=True)  # where the command was given, too
    return Training(Inputs(place.model, place.root, device), place.work, say, [Listening()])
