"""One run of an experiment: trained in a folder of its own, it becomes a line of the ledger."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from hilora.errors import HiLoRAError, InvalidValueError
from hilora.experiments.experiment import AUTO
from hilora.experiments.inputs import Inputs
from hilora.experiments.plan import TUNING, Job, validation
from hilora.experiments.records import DIVERGED, Line
from hilora.experiments.results import results
from hilora.federated.callbacks.base import Callback
from hilora.federated.callbacks.checkpoint import CHECKPOINT, PREVIOUS, checkpoint_dtype, has_checkpoint
from hilora.federated.data.partitions import partition
from hilora.federated.engine.device import DTYPES
from hilora.federated.engine.trainer import Diverged
from hilora.federated.simulation import Simulation
from hilora.reporting.machine import device_name, revision, today

HEAVY = (CHECKPOINT, PREVIOUS, "adapters.safetensors", "heads.safetensors")  # not kept of a finished run


def folder(work: Path, job: Job) -> Path:
    """The folder of a run inside of the scratch folder."""
    return work / f"{job.setting.name}.{job.method.name}.{job.purpose}{job.seed}.{job.fingerprint}"


def lighten(work: Path, job: Job) -> None:
    """Take what is heavy out of the folder of a run that is in the ledger."""
    for name in HEAVY:
        (folder(work, job) / name).unlink(missing_ok=True)


class Training:
    """Trains runs, one after the other.

    Args:
        inputs: backbone and images.
        work: a run's checkpoint, rounds and pictures are in a folder inside.
        say: is told what happened, a line at a time.
        callbacks: of every run, beside its own.
    """

    def __init__(
        self, inputs: Inputs, work: Path, say: Callable[[str], object], callbacks: Sequence[Callback] = ()
    ) -> None:
        self.inputs, self.work, self.say, self.callbacks = inputs, work, say, callbacks
        self._here = {
            "revision": revision(),
            "torch": torch.__version__,
            "device": device_name(inputs.device),
        }

    def train(self, job: Job, dtype: str | None) -> Line:
        """Train a run, or what is left of it, in its folder, which no other process may be at.

        Args:
            dtype: the arithmetic, where it is to be chosen: that of the other runs; None for what is quick here. A run
                that goes on keeps its own.
        """
        with open(folder(self.work, job) / "log.txt", "a", buffering=1, encoding="utf-8") as log:
            try:
                with redirect_stdout(log):
                    figures, used = self._figures(job, dtype)
            except Exception:
                traceback.print_exc(file=log)
                raise
        gc.collect()  # the simulation may be part of a cycle, which would hold the device's memory
        return {
            "key": job.key,
            "decides": {**job.decides, "model": {**job.decides["model"], "dtype": used}},
            "results": figures,
            "date": today(),
            **self._here,
            "dtype": used,
        }

    def _figures(self, job: Job, dtype: str | None) -> tuple[dict[str, Any], str]:
        """The results of a run, or why it could not be trained; and the arithmetic of its backbone."""
        simulation = self._simulation(job, dtype)
        used = str(simulation.engine.dtype).removeprefix("torch.")
        try:
            figures = results(simulation.run())
        except (Diverged, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return {DIVERGED: str(error)}, used
        if job.purpose == TUNING and validation(figures) is None:
            raise InvalidValueError("it has no validation accuracy to choose by: raise val_share or images_per_client")
        return figures, used

    def _simulation(self, job: Job, dtype: str | None) -> Simulation:
        """A new simulation, or the one that was interrupted in this folder."""
        out, (train, test) = folder(self.work, job), self.inputs.images(job.setting)
        population = partition(train, test, job.partition, seed=job.seed)

        def simulation(name: str | None, resume: bool) -> Simulation:
            return Simulation(
                job.strategy,
                job.run,
                self.inputs.backbone,
                train,
                test,
                population,
                out,
                self.inputs.device,
                self._dtype(name),
                resume,
                {**job.key, "partition": job.decides["partition"]},
                self.callbacks,
            )

        if has_checkpoint(out):
            try:
                return simulation(checkpoint_dtype(out), resume=True)
            except (HiLoRAError, KeyError) as error:  # it is unreadable, or of another run or older code
                self.say(f"{job.title} begins again: {error}")
        return simulation(dtype, resume=False)

    def _dtype(self, name: str | None) -> torch.dtype:
        """What the model asks for; else what has this name, or is quick here."""
        return DTYPES.get(name or "", self.inputs.dtype) if self.inputs.model.dtype == AUTO else self.inputs.dtype
