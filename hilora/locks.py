"""A folder for one process at a time, and blocks that Ctrl-C and the like do not break off."""

from __future__ import annotations

import errno
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import FrameType

from hilora.files import clear_leftovers

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF)  # of file systems without them
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal other than that of Ctrl-C.

    Attributes:
        signal: its number.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside of this, SIGTERM and SIGHUP end the main thread's work by `Stopped`, as Ctrl-C does by KeyboardInterrupt,
    so that what was reached is written. One that is ignored, as under nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    with ExitStack() as stack:
        for number in STOPPING:
            if signal.getsignal(number) is signal.SIG_DFL:
                stack.callback(signal.signal, number, signal.signal(number, stop))
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C, SIGTERM and SIGHUP back until the block is done: what belongs together is written together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler not in (signal.SIG_IGN, None):
            signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler not in (signal.SIG_IGN, None):
                signal.signal(number, handler)
    if came:
        signal.raise_signal(came[0])


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Have a folder for oneself, which is made if it is not there: whether no other process has it.

    Half-written files that a killed process has left in it are taken away. Where the file system knows no locks, a file
    with the process's number stands for one; that of a process of this machine that is no more counts for nothing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        ours = _lock(folder, stack)
        if ours:
            clear_leftovers(folder)
        yield ours


def _lock(folder: Path, stack: ExitStack) -> bool:
    """Take a folder's lock until the stack ends: whether no other process has it."""
    try:
        import fcntl
    except ImportError:  # not a Unix
        return _mark(folder / "lock", stack)
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return _mark(folder / "lock", stack)
    return True


def _mark(path: Path, stack: ExitStack) -> bool:
    """The same by a file that only one process can make."""
    for _ in range(2):
        try:
            with open(path, "x") as file:
                file.write(f"{socket.gethostname()} {os.getpid()}")
        except FileExistsError:
            if not _left_behind(path):
                return False
            path.unlink(missing_ok=True)
        else:
            stack.callback(path.unlink, missing_ok=True)
            return True
    return False


def _left_behind(path: Path) -> bool:
    """Whether the process that made a mark is known to be gone."""
    host, _, number = path.read_text().rpartition(" ")
    if host != socket.gethostname() or not number.isdecimal():
        return False
    with suppress(PermissionError):
        try:
            os.kill(int(number), 0)
        except ProcessLookupError:
            return True
    return False
