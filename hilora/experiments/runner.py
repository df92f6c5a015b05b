"""Trains what an experiment needs and the ledger does not have."""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hilora.errors import HiLoRAError, InvalidValueError
from hilora.experiments.experiment import AUTO, Experiment, Method, Setting
from hilora.experiments.inputs import Inputs
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import FINAL, TUNING, Job, choose, final_jobs, tuning_jobs, validation
from hilora.experiments.records import DIVERGED
from hilora.experiments.results import results
from hilora.federated.callbacks.checkpoint import CHECKPOINT, PREVIOUS, checkpoint_dtype, has_checkpoint
from hilora.federated.data.partitions import partition
from hilora.federated.engine.device import DTYPES
from hilora.federated.engine.trainer import Diverged
from hilora.federated.simulation import Simulation
from hilora.locks import claimed
from hilora.reporting.machine import device_name, revision, today

Pair = tuple[Setting, Method]
HEAVY = (CHECKPOINT, PREVIOUS, "adapters.safetensors", "heads.safetensors")  # not kept of a finished run


class Runner:
    """Runs pairs of a setting and a method into a ledger, in an order that fills the table evenly.

    Several processes with the same ledger and scratch folder divide the work: each takes the next run that none is at.

    Args:
        experiment: what is run.
        ledger: what is done; lines are appended to it.
        inputs: backbone and images.
        work: a run's checkpoint, rounds and pictures are in a folder inside.
        say: is told what happened, a line at a time.

    Attributes:
        failed: titles of the runs that ended in an exception.
    """

    def __init__(
        self,
        experiment: Experiment,
        ledger: Ledger,
        inputs: Inputs,
        work: Path,
        say: Callable[[str], object],
    ) -> None:
        self.experiment, self.ledger, self.inputs, self.work, self.say = experiment, ledger, inputs, work, say
        self.failed: list[str] = []
        self._elsewhere: set[str] = set()  # titles of the runs that another process was seen to be at
        self._seconds: dict[tuple[str, str], list[float]] = {}  # (setting, purpose): of the runs of this process
        self._here = {
            "revision": revision(),
            "torch": torch.__version__,
            "device": device_name(inputs.device),
        }

    def run(self, pairs: Sequence[Pair]) -> None:
        """Run all that is missing. A run that fails is reported, and the others go on.

        Raises:
            KeyboardInterrupt: what was finished is in the ledger, and the run in training has its checkpoint.
            OSError: the same, where the ledger or the scratch folder cannot be read or written.
        """
        self.say(f"{self.experiment.title}: {_runs(len(self._missing(pairs)))} to do")
        for job in self._order(pairs):
            if self.ledger.find(job.fingerprint) is not None:
                lighten(self._folder(job))  # where a process was killed before it could
        while self._step(pairs):
            pass

    def _step(self, pairs: Sequence[Pair]) -> bool:
        """Run the first that can be run; whether there was one."""
        self.ledger.read()
        return any(self._attempt(job, pairs) for job in self._order(pairs))

    def _attempt(self, job: Job, pairs: Sequence[Pair]) -> bool:
        """Run a job; False where it is done, has failed, or another process is at it."""
        if self.ledger.find(job.fingerprint) is not None or job.title in self.failed:
            return False
        out = self._folder(job)
        try:
            with claimed(out) as ours:
                if not ours:
                    if job.title not in self._elsewhere:
                        self.say(f"{job.title}: another process is at it")
                    self._elsewhere.add(job.title)
                    return False
                self.ledger.read()
                if self.ledger.find(job.fingerprint) is None:  # else another process has just finished it
                    self._run(job, out, pairs)
        except OSError as error:
            raise OSError(f"stopped at {job.title}: {error}; the same command goes on from here") from error
        except Exception as error:  # whatever it is, it is told, and the other runs go on
            self.failed.append(job.title)
            self.say(f"FAILED {job.title}: {type(error).__name__}: {error}; {self._left(pairs)}")
        return True

    def _folder(self, job: Job) -> Path:
        return self.work / f"{job.setting.name}.{job.method.name}.{job.purpose}{job.seed}.{job.fingerprint}"

    def _order(self, pairs: Sequence[Pair]) -> Iterator[Job]:
        """All runs, done ones included: a setting after the other; in it a method is tuned before its first seed, and
        all methods have had a seed before the next one."""
        for setting in dict.fromkeys(setting.name for setting, _ in pairs):
            here = [pair for pair in pairs if pair[0].name == setting]
            for number in range(len(here[0][0].seeds)):
                for pair in here:
                    if number == 0:
                        yield from tuning_jobs(self.experiment, *pair)
                    yield from final_jobs(self.experiment, self.ledger, *pair)[number : number + 1]

    def _run(self, job: Job, out: Path, pairs: Sequence[Pair]) -> None:
        started = time.perf_counter()
        with open(out / "log.txt", "a", buffering=1, encoding="utf-8") as log:
            try:
                with redirect_stdout(log):
                    figures, dtype = self._figures(job, out)
            except Exception:
                traceback.print_exc(file=log)
                raise
        gc.collect()  # the simulation may be part of a cycle, which would hold the device's memory
        seconds = time.perf_counter() - started
        self.ledger.append(
            {
                "key": job.key,
                "decides": {**job.decides, "model": {**job.decides["model"], "dtype": dtype}},
                "results": figures,
                "date": today(),
                **self._here,
                "dtype": dtype,
            }
        )
        lighten(out)
        self._seconds.setdefault((job.setting.name, job.purpose), []).append(seconds)
        self.say(f"{job.title}: {_headline(figures)}, {seconds:.0f} s; {self._left(pairs)}")

    def _figures(self, job: Job, out: Path) -> tuple[dict[str, Any], str]:
        """The results of a run, or why it could not be trained; and the arithmetic of its backbone."""
        simulation = self._simulation(job, out)
        dtype = str(simulation.engine.dtype).removeprefix("torch.")
        try:
            figures = results(simulation.run())
        except (Diverged, torch.linalg.LinAlgError) as error:  # type: ignore[attr-defined]
            return {DIVERGED: str(error)}, dtype
        if job.purpose == TUNING and validation(figures) is None:
            raise InvalidValueError("it has no validation accuracy to choose by: raise val_share or images_per_client")
        return figures, dtype

    def _simulation(self, job: Job, out: Path) -> Simulation:
        """A new simulation, or the one that was interrupted in this folder."""
        train, test = self.inputs.images(job.setting)
        population = partition(train, test, job.partition, seed=job.seed)

        def simulation(dtype: torch.dtype, resume: bool) -> Simulation:
            return Simulation(
                job.strategy,
                job.run,
                self.inputs.backbone,
                train,
                test,
                population,
                out,
                self.inputs.device,
                dtype,
                resume,
                {**job.key, "partition": job.decides["partition"]},
            )

        if has_checkpoint(out):
            try:
                return simulation(self._dtype(checkpoint_dtype(out)), resume=True)
            except (HiLoRAError, KeyError) as error:  # it is unreadable, or of another run or older code
                self.say(f"{job.title} begins again: {error}")
        return simulation(self._dtype(), resume=False)

    def _dtype(self, begun: str | None = None) -> torch.dtype:
        """The arithmetic of a run. Where it is to be chosen: what it was begun with; or what the newest run with the
        same model has, so that all runs of a table have the same; or else what is quick here."""
        model = asdict(self.experiment.model)
        if model.pop("dtype") != AUTO:
            return self.inputs.dtype
        known = [
            line["dtype"]
            for line in self.ledger.lines
            if {**line["decides"]["model"], **model} == line["decides"]["model"]
        ]
        name = begun or (known[-1] if known else None)
        return DTYPES.get(name or "", self.inputs.dtype)

    def _missing(self, pairs: Sequence[Pair]) -> list[tuple[str, str]]:
        """Setting and purpose of every run that is not done."""
        missing = []
        for setting, method in pairs:
            tuning = tuning_jobs(self.experiment, setting, method)
            finals = final_jobs(self.experiment, self.ledger, setting, method)
            todo = [job.purpose for job in (*tuning, *finals) if self.ledger.find(job.fingerprint) is None]
            if not choose(self.experiment, self.ledger, setting, method).hopeless:
                todo += [FINAL] * (len(setting.seeds) - len(finals))
            missing += [(setting.name, purpose) for purpose in todo]
        return missing

    def _left(self, pairs: Sequence[Pair]) -> str:
        """How many runs are left and, from the runs so far, for how long."""
        missing = self._missing(pairs)
        every = [seconds for some in self._seconds.values() for seconds in some]
        if not missing or not every:
            return f"{_runs(len(missing))} left"
        total = sum(_mean(self._seconds.get(kind, every)) for kind in missing)
        return f"{_runs(len(missing))} left, about {_duration(total)}"


def lighten(folder: Path) -> None:
    """Take what is heavy out of the folder of a run that is in the ledger."""
    for name in HEAVY:
        (folder / name).unlink(missing_ok=True)


def shard(pairs: Sequence[Pair], number: int, count: int) -> list[Pair]:
    """The part of a process out of `count`, numbered from 1; a pair's tuning and finals stay together."""
    return list(pairs[number - 1 :: count])


def _headline(figures: Mapping[str, Any]) -> str:
    if DIVERGED in figures:
        return f"diverged ({figures[DIVERGED]})"
    parts = [(name, (figures.get(key) or {}).get("mean")) for name, key in (("test", "final"), ("val", "val"))]
    return ", ".join(f"{name} {100 * value:.1f} %" for name, value in parts if value is not None)


def _runs(count: int) -> str:
    return f"{count} run{'' if count == 1 else 's'}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min" if minutes else "1 min"
