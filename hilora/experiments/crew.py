"""Who trains the runs of an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Protocol

from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import Job
from hilora.experiments.records import Line
from hilora.experiments.training import Training, folder, lighten
from hilora.locks import claimed

Outcome = Callable[[], AbstractContextManager[Line | None]]
"""Raises what the run ended in, or has its line, which is to be written inside of the block; None where another process
is at the run."""


class Crew(Protocol):
    """Trains runs, `size` of them side by side, of which `free` more can be started now."""

    @property
    def size(self) -> int: ...

    @property
    def free(self) -> int: ...

    def start(self, job: Job, dtype: str | None) -> None:
        """Begin a run; `dtype` is that of the other runs where it is to be chosen, None where there are none."""

    def ended(self) -> Iterator[tuple[Job, Outcome]]:
        """Wait until a run has ended, or more can be started: the runs that have ended."""

    def stop(self) -> Iterator[tuple[Job, Outcome]]:
        """Stop the runs in training; those that have ended meanwhile."""

    def lighten(self, job: Job) -> None:
        """Take what is heavy out of the folder of a run that is in the ledger."""


class Alone:
    """This process, which trains one run after the other. Others with the same ledger and scratch folder may do the
    same: each takes runs that none is at."""

    size = 1

    def __init__(self, training: Training, ledger: Ledger) -> None:
        self.training, self.ledger = training, ledger
        self._next: list[tuple[Job, Outcome]] = []

    @property
    def free(self) -> int:
        return self.size - len(self._next)

    def start(self, job: Job, dtype: str | None) -> None:
        self._next.append((job, partial(self._train, job, dtype)))

    def ended(self) -> Iterator[tuple[Job, Outcome]]:
        yield self._next.pop()

    def stop(self) -> Iterator[tuple[Job, Outcome]]:
        yield from ()

    def lighten(self, job: Job) -> None:
        lighten(self.training.work, job)

    @contextmanager
    def _train(self, job: Job, dtype: str | None) -> Iterator[Line | None]:
        with claimed(folder(self.training.work, job)) as ours:
            if not ours:
                yield None
                return
            self.ledger.read()
            done = self.ledger.find(job.fingerprint)  # by another process, a moment ago
            yield done or self.training.train(job, dtype)
