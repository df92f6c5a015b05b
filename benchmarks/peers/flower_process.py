"""Flower's rounds in processes of its own, which sleep while others are timed: its engine polls, Ray's actors stay."""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from multiprocessing.connection import Connection

import psutil  # type: ignore[import-untyped, unused-ignore]
import torch
from torch import Tensor

from benchmarks.federation import Federation, Round


class FlowerProcess:
    """A simulation that is asked for rounds.

    Args:
        shape: of the federation, which the process makes for itself.
    """

    def __init__(self, shape: Round) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        arguments = theirs, shape, torch.get_num_threads()
        self.process = context.Process(target=_serve, args=arguments, daemon=False)
        self.process.start()

    def round(self) -> list[Tensor]:
        """B of the leaves and weights of the heads of all clients."""
        self._signal(signal.SIGCONT)
        self.pipe.send(True)
        found = self.pipe.recv()
        self._signal(signal.SIGSTOP)
        if isinstance(found, Exception):
            raise found
        return [torch.from_numpy(value) for value in found]

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self.pipe.send(False)
        self.process.join(timeout=60)

    def _signal(self, number: int) -> None:
        """To the process and to all that it started."""
        own = psutil.Process(self.process.pid)
        for one in (own, *own.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                one.send_signal(number)


def _serve(pipe: Connection, shape: Round, threads: int) -> None:
    from benchmarks.peers.flower_round import FlowerRounds

    torch.set_num_threads(threads)
    rounds = FlowerRounds(Federation(shape, torch.device("cuda" if torch.cuda.is_available() else "cpu")))
    while pipe.recv():
        try:
            pipe.send([value.numpy() for value in rounds.round()])
        except Exception as error:
            pipe.send(error)
    rounds.close()
