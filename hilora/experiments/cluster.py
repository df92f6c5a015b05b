"""The runs of an experiment on the workers of a Dask cluster, a run on each."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from multiprocessing import resource_tracker
from time import sleep
from typing import Any

import torch
from dask.system import CPU_COUNT
from distributed import CancelledError, Client, Future, KilledWorker, Nanny, Scheduler, SpecCluster, wait
from distributed.utils import silence_logging_cmgr

from hilora.errors import HiLoRAError, ResourceError
from hilora.experiments import worker
from hilora.experiments.crew import Outcome
from hilora.experiments.experiment import AUTO, Setting
from hilora.experiments.plan import Job
from hilora.experiments.records import Line
from hilora.experiments.training import lighten
from hilora.experiments.worker import Place
from hilora.locks import uninterrupted
from hilora.version import __version__

HOST = "127.0.0.1"  # of local workers
WAITING = "no worker: waiting for one"
CORES = 4  # of a CPU, for a local worker
PATIENCE = 10.0  # seconds for a scheduler to answer
POLL = 1.0  # seconds between two looks at who works


class Cluster:
    """The workers that a scheduler has, which may come and go.

    A run whose worker is lost is done again by another, from its checkpoint where that one finds it. After as many
    lost workers as the scheduler allows for (`distributed.scheduler.allowed-failures`, 3) the run has failed.

    Args:
        client: of the scheduler.
        place: where the workers find what they need.
        settings: those whose data they need.
        say: is told how many workers there are.
    """

    def __init__(self, client: Client, place: Place, settings: Sequence[Setting], say: Any) -> None:
        self.client, self.place, self.settings, self.say = client, place, settings, say
        self._running: dict[Future, Job] = {}
        self._workers: set[str] = set()
        self._look()
        if not self._workers:
            self.say(WAITING)

    @property
    def size(self) -> int:
        return len(self._workers)

    @property
    def free(self) -> int:
        return max(0, self.size - len(self._running))

    def start(self, job: Job, dtype: str | None) -> None:
        dtype = self._quick if dtype is None and self.place.model.dtype == AUTO else dtype
        self._running[self.client.submit(worker.train, self.place, job, dtype, pure=False)] = job

    def ended(self) -> Iterator[tuple[Job, Outcome]]:
        free = self.free
        while not any(future.done() for future in self._running) and self.free <= free:
            with suppress(TimeoutError, CancelledError):
                wait(list(self._running), POLL, "FIRST_COMPLETED") if self._running else sleep(POLL)
            self._look()
        return self._over()

    def stop(self) -> Iterator[tuple[Job, Outcome]]:
        over = list(self._over())
        if self.client.status == "running":
            self.client.cancel(list(self._running))
        return iter(over)

    def lighten(self, job: Job) -> None:
        self.client.run(lighten, self.place.work, job, on_error="ignore")

    def _over(self) -> Iterator[tuple[Job, Outcome]]:
        """The runs that have ended, which leave the list."""
        for future in [future for future in self._running if future.status in ("finished", "error")]:
            yield self._running.pop(future), partial(_outcome, future)

    @cached_property
    def _quick(self) -> str:
        """The arithmetic that is quick on a worker, for all of them."""
        return str(self.client.submit(worker.quick, self.place, pure=False).result())

    def _look(self) -> None:
        """Who works now. One that has just come must have what runs need."""
        try:
            found = set(self.client.nthreads()) if self.client.status == "running" else None
        except OSError:
            found = None
        if found is None or any(future.cancelled() for future in self._running):  # not by us
            raise ResourceError("the scheduler is gone; once there is one, the same command goes on from here")
        for address in found - self._workers:
            call = partial(self.client.run, worker.check, self.place, self.settings, __version__)
            error = call(workers=[address], on_error="return").get(address)
            if isinstance(error, HiLoRAError | ImportError):
                raise ResourceError(f"the worker {address} cannot be used: {error}")
        if found != self._workers:
            self.say(f"{len(found)} worker{'' if len(found) == 1 else 's'}" if found else WAITING)
        self._workers = found


@contextmanager
def _outcome(future: Future) -> Iterator[Line | None]:
    try:
        line = future.result()
    except KilledWorker as error:
        lost = f"{error.allowed_failures + 1} workers were lost while they trained it"
        raise ResourceError(f"{lost}, the last one {error.last_worker.address}") from error
    yield line


@contextmanager
def connected(on: str, workers: int | None, device: str | None) -> Iterator[Client]:
    """A client of the scheduler at an address, or of one with workers on this machine, which ends with the block.

    Args:
        on: the address, or "local".
        workers: how many local ones; None for one a GPU, or for each four cores where there is none.
        device: what they compute on; None for a GPU where there is one.

    Raises:
        ResourceError: no scheduler answers.
    """
    with ExitStack() as stack:
        stack.enter_context(silence_logging_cmgr(logging.CRITICAL))  # what matters is said by the runner
        scheduler: str | SpecCluster = on
        if on == "local":
            with uninterrupted(), _deaf():
                scheduler = stack.enter_context(_local(workers, device))
        try:
            client = stack.enter_context(Client(scheduler, timeout=PATIENCE))
        except (OSError, ValueError) as error:
            raise ResourceError(f"no Dask scheduler answers at {on}: `dask scheduler` starts one ({error})") from error
        yield client


def _local(workers: int | None, device: str | None) -> SpecCluster:
    """Workers that are processes of this machine. They share its cores, and each has a GPU."""
    gpus = _gpus() if device in (None, "cuda") else []
    count = workers or len(gpus) or max(1, CPU_COUNT // CORES)
    options: dict[str, Any] = {
        "host": HOST,
        "nthreads": max(1, CPU_COUNT // count),
        "memory_limit": 0,  # a run's memory is its own affair
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    environment = [{"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {} for number in range(count)]
    return SpecCluster(
        {number: {"cls": Nanny, "options": {**options, "env": env}} for number, env in enumerate(environment)},
        {"cls": Scheduler, "options": {"host": HOST, "port": 0, "dashboard": False, "dashboard_address": f"{HOST}:0"}},
        silence_logs=logging.CRITICAL,
    )


@contextmanager
def _deaf() -> Iterator[None]:
    """What is started inside, threads and processes, does not hear Ctrl-C for as long as it lives: that is for the
    command, which ends its workers. It is inherited, so that it holds for workers in the place of lost ones, too."""
    if not hasattr(signal, "pthread_sigmask"):  # not a Unix
        yield
        return
    resource_tracker.ensure_running()  # in some versions of Python it unblocks signals when it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    given, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return (given.split(",") if given else [str(number) for number in range(count)])[:count]
