"""A training on the terminal: a bar of its rounds, and a line for each stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hilora.federated.callbacks.base import Callback, Round
from hilora.reporting.progress import Progress

if TYPE_CHECKING:
    from hilora.federated.loop import Loop


class ProgressBar(Callback):
    """Shows rounds done, accuracy and time left, where there is a terminal."""

    name = "progress"
    bar: Progress | None = None

    def begin(self, loop: Loop) -> None:
        self.bar = Progress(sum(stage.rounds for stage in loop.stages), loop.name).__enter__()

    def commit(self, loop: Loop, round: Round) -> None:
        if self.bar is not None:
            self.bar.round(round.record)

    def end(self, loop: Loop) -> None:
        if self.bar is not None:
            self.bar.__exit__(None if loop.finished else KeyboardInterrupt, None, None)
