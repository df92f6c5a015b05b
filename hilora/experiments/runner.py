"""Trains what an experiment needs and the ledger does not have."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from hilora.experiments.crew import Crew, Outcome
from hilora.experiments.experiment import Experiment, Method, Setting
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import FINAL, Job, choose, final_jobs, tuning_jobs
from hilora.experiments.records import DIVERGED, Line

Pair = tuple[Setting, Method]


class Runner:
    """Runs pairs of a setting and a method into a ledger, in an order that fills the table evenly.

    Args:
        experiment: what is run.
        ledger: what is done; lines are appended to it.
        crew: who trains.
        say: is told what happened, a line at a time.

    Attributes:
        failed: titles of the runs that ended in an exception.
    """

    def __init__(self, experiment: Experiment, ledger: Ledger, crew: Crew, say: Callable[[str], object]) -> None:
        self.experiment, self.ledger, self.crew, self.say = experiment, ledger, crew, say
        self.failed: list[str] = []
        self._started: dict[str, float] = {}  # when, by title: the runs in training
        self._passed: set[str] = set()  # titles of the runs that another process is at, until a run ends
        self._elsewhere: set[str] = set()  # those of which this was told
        self._seconds: dict[tuple[str, str], list[float]] = {}  # (setting, purpose): of the runs that were trained

    def run(self, pairs: Sequence[Pair]) -> None:
        """Run all that is missing. A run that fails is reported, and the others go on.

        Raises:
            KeyboardInterrupt: what was finished is in the ledger, and the runs in training have their checkpoints.
            OSError: the same, where the ledger or the scratch folder cannot be read or written.
        """
        self.say(f"{self.experiment.title}: {_runs(len(self._missing(pairs)))} to do")
        for job in self._order(pairs):
            if self.ledger.find(job.fingerprint) is not None:
                self.crew.lighten(job)  # where a process was killed before it could
        try:
            while self._start(pairs):
                for job, outcome in self.crew.ended():
                    self._take(job, outcome, pairs)
        except BaseException:
            with suppress(OSError):
                for job, outcome in self.crew.stop():
                    self._take(job, outcome, pairs)
            raise

    def _start(self, pairs: Sequence[Pair]) -> bool:
        """Start the first runs that can be, as many as there is room for; whether anything is left to wait for."""
        self.ledger.read()
        busy = {*self._started, *self._passed, *self.failed}
        ready = [job for job in self._order(pairs) if job.title not in busy and not self.ledger.find(job.fingerprint)]
        for job in ready[: self.crew.free]:
            self._started[job.title] = time.perf_counter()
            self.crew.start(job, self._dtype())
        return bool(ready or self._started)

    def _take(self, job: Job, outcome: Outcome, pairs: Sequence[Pair]) -> None:
        """Take in how a run ended."""
        started = self._started.pop(job.title)
        try:
            with outcome() as line:
                if line is None:
                    self._passed.add(job.title)
                    if job.title not in self._elsewhere:
                        self.say(f"{job.title}: another process is at it")
                    self._elsewhere.add(job.title)
                    return
                self._keep(job, line, time.perf_counter() - started, pairs)
        except OSError as error:
            raise OSError(f"stopped at {job.title}: {error}; the same command goes on from here") from error
        except Exception as error:  # whatever it is, it is told, and the other runs go on
            self.failed.append(job.title)
            self.say(f"FAILED {job.title}: {type(error).__name__}: {error}; {self._left(pairs)}")
        self._passed.clear()

    def _keep(self, job: Job, line: Line, seconds: float, pairs: Sequence[Pair]) -> None:
        self.ledger.read()
        if self.ledger.find(job.fingerprint) is not None:  # another process was quicker
            return
        self.ledger.append(line)
        self.crew.lighten(job)
        self._seconds.setdefault((job.setting.name, job.purpose), []).append(seconds)
        self.say(f"{job.title}: {_headline(line['results'])}, {seconds:.0f} s; {self._left(pairs)}")

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

    def _dtype(self) -> str | None:
        """The arithmetic of the newest run with the same model, so that all runs of a table have the same."""
        model = {name: value for name, value in asdict(self.experiment.model).items() if name != "dtype"}
        known = [one["dtype"] for one in self.ledger.lines if model.items() <= one["decides"]["model"].items()]
        return known[-1] if known else None

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
        return f"{_runs(len(missing))} left, about {_duration(total / max(1, self.crew.size))}"


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
