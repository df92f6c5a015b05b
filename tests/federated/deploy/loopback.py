"""Flower's deployment engine on this machine: a SuperLink, SuperNodes, TLS, keys of nodes, and runs by `flwr run`."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.federated.deploy.certificates import Certificates, make_certificates, make_node_key
from tests.federated.deploy.nursery import ask

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.2",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
CONNECTION = """[superlink]
default = "loopback"

[superlink.loopback]
address = "{address}"
root-certificates = "{authority}"
"""


class Command(NamedTuple):
    """A command that has ended: its exit code and what it said."""

    code: int
    output: str


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def until(true: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    """Waits for something to be true, and says what it was where it never is."""
    end = time.monotonic() + seconds
    while not (found := true()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.05)
    return found


def as_config(values: Mapping[str, Any]) -> str:
    """Values as Flower's command line takes them."""
    return " ".join(f"{key}={json.dumps(value)}" for key, value in values.items())


class Loopback:
    """A started SuperLink and the SuperNodes that were started at it.

    Args:
        folder: for certificates, keys, Flower's own files and logs.
        nursery: the socket of the process that starts others.
    """

    def __init__(self, folder: Path, nursery: Path) -> None:
        self.folder, self.nursery = folder, nursery
        self.port = free_port()
        self.certificates: Certificates = make_certificates(folder)
        self.nodes: dict[int, int] = {}
        """Numbers of the SuperNodes' processes, by the SuperNodes' own numbers."""
        self._commands = 0
        home = Path(folder / "flwr")
        home.mkdir()
        text = CONNECTION.format(address=self.address, authority=self.certificates.authority)
        (home / "config.toml").write_text(text)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def log(self, name: str) -> str:
        """What a process and those that it started said: "superlink", "node0"…"""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self, *argv: str, log: str) -> int:
        path = self.folder / f"{log}.log"
        return int(ask(self.nursery, do="start", argv=argv, parent=0, log=str(path)))

    def start_superlink(self) -> int:
        authority, server, key = self.certificates
        pid = self.start(
            *("flower-superlink", "--port", str(self.port), "--enable-supernode-auth"),
            *("--ssl-ca-certfile", str(authority), "--ssl-certfile", str(server), "--ssl-keyfile", str(key)),
            "--disable-runtime-dependency-installation",
            log="superlink",
        )
        context = ssl.create_default_context(cafile=str(authority))

        def healthy() -> bool:
            try:
                with urllib.request.urlopen(f"https://{self.address}/health", timeout=5, context=context) as answer:
                    return bool(answer.status == 200)
            except OSError:
                return False

        until(healthy, "the SuperLink answers")
        return pid

    def start_node(self, node: int, config: Mapping[str, Any], superlink: str | None = None) -> int:
        """Starts a SuperNode; its key is made and registered the first time. Returns when it is connected."""
        key = self.folder / f"node{node}.key"
        if not key.exists():
            self.flwr("supernode", "register", str(make_node_key(key).with_suffix(".pub")), "loopback")
        said = self.log(f"node{node}").count("SuperNode ID:")

        def connected() -> bool:
            """Starts it again where the SuperLink takes another process with its key to be alive."""
            if node not in self.nodes or ask(self.nursery, do="code", pid=self.nodes[node]) is not None:
                self.nodes[node] = self.start(
                    *("flower-supernode", "--superlink", superlink or self.address, "--port", str(free_port())),
                    *("--root-certificates", str(self.certificates.authority), "--node-config", as_config(config)),
                    *("--auth-supernode-private-key", str(key)),
                    log=f"node{node}",
                )
            return self.log(f"node{node}").count("SuperNode ID:") > said

        until(connected, f"SuperNode {node} is connected")
        return int(re.findall(r"SuperNode ID: (\d+)", self.log(f"node{node}"))[-1])

    def kill_node(self, node: int) -> None:
        """Kills a SuperNode and what it runs, without a word to anybody (SIGKILL)."""
        ask(self.nursery, do="kill", pid=self.nodes.pop(node))

    def kill_server(self) -> None:
        """Kills the ServerApp that runs (SIGKILL); the SuperLink lives."""
        (pid,) = ask(self.nursery, do="running", name="flwr-serverapp", under=0)
        os.kill(pid, signal.SIGKILL)

    def flwr(self, *arguments: str, check: bool = True) -> Command:
        """A command of `flwr`, to its end."""
        name, pid = self.begin(*arguments)
        return self.end(name, pid, check=check)

    def begin(self, *arguments: str) -> tuple[str, int]:
        self._commands += 1
        name = f"flwr{self._commands}"
        return name, self.start("flwr", *arguments, log=name)

    def end(self, name: str, pid: int, seconds: float = 120, check: bool = True) -> Command:
        until(lambda: ask(self.nursery, do="code", pid=pid) is not None, f"{name} ends", seconds)
        done = Command(ask(self.nursery, do="code", pid=pid), self.log(name))
        assert done.code == 0 or not check, done.output
        return done

    def submit(self, app: Path, config: Mapping[str, Any]) -> int:
        """Starts a run of an app, and returns its number."""
        done = self.flwr("run", str(app), "loopback", "--run-config", as_config(config), "--format", "json")
        return int(json.loads(done.output[done.output.index("{") :])["run-id"])

    def stop(self, run: int) -> None:
        """Give a run up."""
        self.flwr("stop", str(run), "loopback")

    def status(self, run: int) -> str:
        """Of a run: "running", "finished:completed"…"""
        done = self.flwr("list", "--run-id", str(run), "loopback", "--format", "json")
        (found,) = json.loads(done.output[done.output.index("{") :])["runs"]
        return str(found["status"])

    def finish(self, run: int, seconds: float = 120) -> str:
        """Waits for a run to end, and returns its log."""
        name, pid = self.begin("log", str(run), "loopback", "--stream")
        return self.end(name, pid, seconds).output


@contextmanager
def loopback(folder: Path) -> Iterator[Loopback]:
    """A SuperLink with TLS that knows its SuperNodes by their keys; when it is left, however, no process remains."""
    environment = {**os.environ, **ENVIRONMENT, "FLWR_HOME": str(folder / "flwr")}
    nursery = folder / "nursery"
    command = [sys.executable, "-m", "tests.federated.deploy.nursery", str(nursery)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    # in a session of its own, so that a signal to ours does not keep it from ending the others
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            made = Loopback(folder, nursery)
            made.start_superlink()
            yield made
        finally:
            assert process.stdin is not None
            process.stdin.close()
            process.wait(30)
