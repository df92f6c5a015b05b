"""What is seen of the library on a terminal: what it says and logs, a bar of the rounds, how a command ends."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from hilora.errors import told
from hilora.locks import Stopped, stoppable

log = logging.getLogger("hilora")
Item = TypeVar("Item")
_SILENT = ContextVar("silent", default=False)
WRONG, CLOSED = 2, 141  # exit codes: something given cannot be used; nobody reads the output


@contextmanager
def silent() -> Iterator[None]:
    """Inside of the block nothing is said on stdout and no bar is drawn; what goes wrong is still said on stderr."""
    token = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(token)


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line, to stdout unless told otherwise, without breaking a bar. Signs that it cannot show become `?`, and
    where nobody listens any more nothing is said: no run ends because of it."""
    stream = stream or sys.stdout
    if stream is None or (_SILENT.get() and stream is sys.stdout):
        return
    with suppress(OSError, ValueError):  # closed, by the other side or by this one
        encoding = stream.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding), file=stream)
        stream.flush()


def stopped(error: KeyboardInterrupt, more: str = "") -> int:
    """Says that a command was interrupted, and more; returns its exit code, as shells have it: 130 after Ctrl-C."""
    by = f" by {error}" if isinstance(error, Stopped) else ""
    say(f"\ninterrupted{by}{more}", sys.stderr)
    return 128 + (error.signal if isinstance(error, Stopped) else signal.SIGINT)


def ending(work: Callable[[], int]) -> int:
    """What a command ends with: the exit code of its work; or of what stopped that, which is said in one line, unless
    it is a bug."""
    try:
        with stoppable():
            code = work()
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        return stopped(error)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        return CLOSED
    except Exception as error:
        said = told(error)
        if said is None:
            raise
        say(f"error: {said}", sys.stderr)
        return WRONG


def counted(items: Iterable[Item], total: int, what: str, done: int = 0) -> Iterator[Item]:
    """The same items, with a bar of how many of `total` are done on stderr, where that is a terminal and it takes long.

    Args:
        items: those that are left.
        total: how many there are in all, `done` of them before.
        what: they are.
    """
    yield from tqdm(
        items, what, total, initial=done, unit="", delay=2, leave=False, dynamic_ncols=True, disable=not _bars()
    )


def _bars() -> bool:
    """Whether there is a terminal to draw bars on."""
    return not (_SILENT.get() or sys.stderr is None or sys.stderr.closed) and sys.stderr.isatty()


class Terminal(logging.Handler):
    """Says what is logged on stdout, as it is at that moment, a line a record."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            say(self.format(record))
        except Exception:  # as logging's own handlers do: what cannot be told must not end a run
            self.handleError(record)


@contextmanager
def on_terminal() -> Iterator[None]:
    """Show on stdout what the library logs, from INFO on, inside of the block; blocks may be nested."""
    if any(isinstance(handler, Terminal) for handler in log.handlers):
        yield
        return
    handler, before = Terminal(), log.level
    log.addHandler(handler)
    log.setLevel(min(logging.INFO, log.getEffectiveLevel()))
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class Progress:
    """Rounds done, accuracy and time left as a bar on stderr; what is logged meanwhile, and the end of each stage, on
    stdout.

    Args:
        total_rounds: rounds of the whole run.
        label: stands before the bar and every stage's line.
        enabled: whether to draw the bar; None draws it where stderr is a terminal.
    """

    def __init__(self, total_rounds: int, label: str, enabled: bool | None = None) -> None:
        self.label = label
        self._total = total_rounds
        self._enabled = _bars() if enabled is None else enabled
        self._bar: tqdm[Any] | None = None
        self._last: Mapping[str, Any] | None = None
        self._terminal = ExitStack()

    def __enter__(self) -> Progress:
        self._terminal.enter_context(on_terminal())
        form = "{desc}: {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"  # fits 80 columns
        disable = not self._enabled
        self._bar = tqdm(total=self._total, desc=self.label, bar_format=form, dynamic_ncols=True, disable=disable)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._terminal:
            if self._bar is not None:
                self._bar.close()  # before all else: whatever happened, the terminal is whole again
                self._bar = None
            if self._last is not None:
                self._stage_line("done" if kind is None else "stopped")

    def round(self, record: Mapping[str, Any]) -> None:
        """Show a round; the first one of a resumed run moves the bar to where it left off."""
        if self._last is not None and self._last["stage"] != record["stage"]:
            self._stage_line("done")
        if self._bar is not None:
            if self._last is None:
                self._bar.initial = self._bar.n = record["round"] - 1
            self._bar.set_postfix_str(f"{record['stage']}, {_standing(record)}", refresh=False)
            self._bar.update(record["round"] - self._bar.n)
        self._last = record

    def _stage_line(self, state: str) -> None:
        assert self._last is not None
        count, seconds = self._last["round_in_stage"], self._last.get("seconds")
        pace = "" if seconds is None else f" ({seconds:.1f} s the last)"
        rounds = f"{count} round{'' if count == 1 else 's'}"
        log.info("%s: %s %s, %s%s, %s", self.label, self._last["stage"], state, rounds, pace, _standing(self._last))


def _standing(record: Mapping[str, Any]) -> str:
    """The figures of a round in a few words."""
    test = record.get("test") or {}
    parts = [
        f"{name} {100 * value:.1f} %"
        for name, value in (("acc", test.get("mean")), ("tail", test.get("tail")))
        if value is not None
    ]
    loss = record.get("loss")
    return ", ".join(parts + ([f"loss {loss:.3f}"] if loss is not None and loss == loss else []))
