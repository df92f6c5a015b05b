"""Flower's commands as forks of one process that has imported Flower and hilora: each starts in milliseconds.

Nothing else is changed: a SuperNode still starts a SuperExec, and this a ClientApp for each message, each a process of
its own with its own memory. Only how a process comes about differs, and how long the idle ones sleep. A request is a
line of JSON on a Unix socket. When the standard input ends, however the parent ended, all that was started is killed.
"""

from __future__ import annotations

import importlib
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
import traceback
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from hilora.models.backbone import load_backbone

COMMANDS = {point.name: point for point in entry_points(group="console_scripts") if "flwr" in point.value}
PRELOADED = (
    "flwr.superlink.main",
    "flwr.supernode.main",
    "hilora.federated.deploy.flower",
    "hilora.federated.simulation",
)
SLEEPY = ("flwr.supernode.start_client_internal", "flwr.superlink.grid.http_grid")
HASTE = 10
"""SuperNodes and ServerApps look for messages every 3 / HASTE seconds, in the place of 3."""
HEARTBEAT = 5
"""Seconds from one sign of life of a SuperNode to the next, in the place of 30; without any for twice as long it is
taken to be gone, and only then another process may have its key."""


class Child(NamedTuple):
    """A process that was started: its command, the one that asked for it, and where its output goes."""

    argv: list[str]
    parent: int
    log: str


def ask(path: Path, **request: Any) -> Any:
    """Sends one request to the nursery at a socket, and waits for its answer."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as answer:
            return json.loads(answer.readline())


class Nursery:
    """Starts, watches and kills processes; it has one thread, so that it can be forked at any time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.children: dict[int, Child] = {}
        self.codes: dict[int, int] = {}

    def serve(self) -> None:
        """Answers requests until the standard input ends."""
        with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
            listener.bind(str(self.path))
            listener.listen(64)
            selector.register(listener, selectors.EVENT_READ)
            selector.register(sys.stdin, selectors.EVENT_READ)
            print("ready", flush=True)
            while True:
                for key, _ in selector.select(timeout=0.1):
                    if key.fileobj is sys.stdin:
                        return
                    connection, _ = listener.accept()
                    with connection, connection.makefile("rw") as file:
                        answer = self.answer(**json.loads(file.readline()))
                        file.write(json.dumps(answer) + "\n")
                self.reap()

    def answer(self, do: str, **request: Any) -> Any:
        """`start` a command: its number; `kill` one and what it started; those `running` under one; `code` of one."""
        if do == "start":
            return self.start(**request)
        self.reap()
        if do == "kill":
            return self.kill(request["pid"])
        if do == "running":
            found = self.below(request["under"])
            return [pid for pid in found if request["name"] in ("", self.children[pid].argv[0])]
        return self.codes.get(request["pid"])

    def below(self, pid: int) -> list[int]:
        """What still runs because of a process; 0 for what the nursery's own parent asked for."""
        found = [other for other, child in self.children.items() if child.parent == pid]
        under = [one for other in found for one in self.below(other)]
        return [other for other in found if other not in self.codes] + under

    def start(self, argv: list[str], parent: int, log: str) -> int:
        log = log or self.children[parent].log
        pid = os.fork()
        if pid == 0:
            become(argv, log, self.path)
        self.children[pid] = Child(argv, parent, log)
        return pid

    def kill(self, pid: int) -> list[int]:
        """Kills a process and all that runs because of it, at once."""
        gone = self.below(pid) + [one for one in self.children if one == pid and one not in self.codes]
        for one in gone:
            os.kill(one, signal.SIGKILL)
        return gone

    def reap(self) -> None:
        """Keeps the exit codes of those that have ended."""
        while len(self.codes) < len(self.children):
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self.codes[pid] = os.waitstatus_to_exitcode(status)


class Started:
    """What Flower's code sees of a process that the nursery has started for it."""

    def __init__(self, path: Path, pid: int) -> None:
        self.path, self.pid = path, pid

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def wait(self, timeout: float) -> int:
        end = time.monotonic() + timeout
        while (code := ask(self.path, do="code", pid=self.pid)) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("flwr", timeout)
            time.sleep(0.02)
        return int(code)


def become(argv: list[str], log: str, path: Path) -> NoReturn:
    """Turns this fork into a command of Flower's."""
    code = 1
    try:
        os.setsid()
        with open(log, "ab", buffering=0) as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        popen = subprocess.Popen

        def start(args: Any, *rest: Any, **options: Any) -> Any:
            if isinstance(args, list) and args[0] in COMMANDS:
                return Started(path, ask(path, do="start", argv=args, parent=os.getpid(), log=""))
            return popen(args, *rest, **options)

        subprocess.Popen = start  # type: ignore[assignment,misc]
        hasty = SimpleNamespace(time=time.time, sleep=lambda seconds: time.sleep(seconds / HASTE))
        for name in SLEEPY:
            importlib.import_module(name).__dict__["time"] = hasty
        sys.argv = argv
        COMMANDS[argv[0]].load()()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hasten() -> None:
    """Shortens the times that Flower's modules take from its constants when they are imported."""
    objects: Any = importlib.import_module("flwr.supercore.constant")
    objects.PULL_INITIAL_BACKOFF, objects.PULL_BACKOFF_CAP = 1 / HASTE, 10 / HASTE
    heart: Any = importlib.import_module("flwr.common.constant")
    heart.HEARTBEAT_DEFAULT_INTERVAL, heart.HEARTBEAT_MIN_INTERVAL = HEARTBEAT, HEARTBEAT


def main() -> None:
    hasten()
    for name in PRELOADED:
        importlib.import_module(name)
    for name in (
        "flwr",
        "flower-superlink",
        "flower-supernode",
        "flower-superexec",
        "flwr-serverapp",
        "flwr-clientapp",
    ):
        COMMANDS[name].load()
    load_backbone("glyph_vit")  # imports timm's models
    nursery = Nursery(Path(sys.argv[1]))
    try:
        nursery.serve()
    finally:
        nursery.reap()
        for pid in nursery.kill(0):
            os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
