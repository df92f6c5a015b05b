"""What a round takes on Flower's deployment engine, beside the same round in a simulation, and where the time goes.

    python -m benchmarks.deployment --clients 3 --rounds 3

Flower's own commands run on this machine, without TLS, on generated images. The parts are timed by themselves: a
process of a client up to its first line, a client made ready, a local epoch, a message written and read.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hilora.federated.data.glyphs import load_glyphs
from hilora.federated.data.partitions import partition
from hilora.federated.deploy import flower
from hilora.federated.deploy.messages import Done, Errand, of_bytes, to_bytes
from hilora.federated.deploy.settings import asked
from hilora.federated.deploy.wire import written
from hilora.federated.protocol import Stage
from hilora.federated.simulation import Simulation
from hilora.models.backbone import load_backbone

ROOT = Path(__file__).resolve().parent.parent


def config(clients: int, rounds: int, out: Path) -> dict[str, Any]:
    """A run of one tier; nothing is evaluated before its end."""
    shared = {"backbone": "glyph_vit", "classes": "50", "partition": "sc-dir", "images-per-client": 64}
    return {
        **shared,
        "strategy": "fedit",
        "clients": clients,
        "rounds": f"{rounds},0,0",
        "evaluate-every": 0,
        "out": str(out),
    }


def seconds(step: Callable[[], Any], times: int = 5) -> float:
    """The median of several."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@contextmanager
def network(folder: Path, clients: int, environment: dict[str, str]) -> Iterator[None]:
    """A SuperLink and SuperNodes, until the end."""
    port = free_port()
    home = folder / "flwr"
    home.mkdir()
    connection = f'[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(connection)
    commands = [
        ["flower-superlink", "--insecure", "--disable-runtime-dependency-installation", "--port", str(port)],
        *(
            ["flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(free_port())]
            + ["--node-config", f"client-id={client} data='glyphs'"]
            for client in range(clients)
        ),
    ]
    with open(folder / "log", "wb") as log:
        started = [subprocess.Popen(command, env=environment, stdout=log, stderr=log) for command in commands]
        try:
            yield
        finally:
            for process in started:
                process.terminate()
            for process in started:
                process.wait(30)


def app(folder: Path, settings: dict[str, Any]) -> Path:
    """The app of examples/flower with other settings."""
    place = folder / "app"
    place.mkdir()
    template = ROOT / "examples" / "flower"
    for name in ("server_app.py", "client_app.py"):
        (place / name).write_text((template / name).read_text())
    head, section, _ = (template / "pyproject.toml").read_text().partition("[tool.flwr.app.config]\n")
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())
    (place / "pyproject.toml").write_text(head + section + lines)
    return place


def deployed(clients: int, rounds: int, folder: Path) -> list[float]:
    """Seconds of each round but the last, which is evaluated as well."""
    out = folder / "out"
    environment = {**os.environ, "FLWR_HOME": str(folder / "flwr"), "PYTHONPATH": str(ROOT)}
    environment |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with network(folder, clients, environment):
        command = ["flwr", "run", str(app(folder, config(clients, rounds, out))), "here", "--stream"]
        for _ in range(60):  # until the SuperLink answers
            if subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(1)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["seconds"] for record in records[:-1]]


def simulated(clients: int, rounds: int, folder: Path) -> list[float]:
    """The same in one process; without the first round, in which all is warmed up, and the last."""
    what = asked(config(clients, rounds, folder))
    assert what.partition is not None
    train, test = load_glyphs(what.training.seed)
    population = partition(train, test, what.partition, seed=what.training.seed)
    backbone, device = load_backbone("glyph_vit"), torch.device("cpu")
    Simulation(what.strategy, what.training, backbone, train, test, population, folder, device).run()
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["seconds"] for record in records[1:-1]]


def parts(clients: int, folder: Path) -> dict[str, float]:
    """Seconds of what a client does for each message, by itself."""
    node = {"client-id": 0, "data": "glyphs"}
    context: Any = SimpleNamespace(run_config=config(clients, 1, folder), node_config=node)
    member = flower._member(context, None)
    tiers = {tier: written(table) for tier, table in member.layout.tiers.items()}
    errand = Errand(run="0" * 16, purpose="training", number=1, stage=Stage("root", 1, "root"), round=1)
    head = written(member.layout.head)
    upload = Done(errand=errand, client=0, images=64, tiers=tiers, head=head, choice=None, scores=None)
    command = [sys.executable, "-c", "import flwr.supernode.cli, hilora.federated.deploy.flower"]
    return {
        "a process, with its imports": seconds(lambda: subprocess.run(command, cwd=ROOT, check=True), 3),
        "images, backbone and adapters": seconds(lambda: flower._member(context, None), 3),
        f"an upload of {len(to_bytes(upload)) / 1e3:.0f} kB written and read": seconds(
            lambda: of_bytes(to_bytes(upload), Done)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=4, help="at least 3")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = parts(given.clients, folder / "parts")
        found["a round in a simulation, all clients"] = statistics.median(
            simulated(given.clients, given.rounds, folder / "simulated")
        )
        found["a round on Flower, all clients"] = statistics.median(deployed(given.clients, given.rounds, folder))
    print(f"{given.clients} clients, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for what, taken in found.items():
        print(f"{taken:8.3f} s  {what}")


if __name__ == "__main__":
    main()
