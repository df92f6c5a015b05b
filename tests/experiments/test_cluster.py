"""Runs on several workers: what one machine has, whoever is lost meanwhile."""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from dask.system import CPU_COUNT
from distributed import Client, Scheduler, SpecCluster

from hilora.errors import ResourceError
from hilora.experiments import cluster
from hilora.experiments.__main__ import main
from hilora.experiments.cluster import Cluster, connected
from hilora.experiments.experiment import Experiment
from hilora.experiments.ledger import Ledger
from hilora.experiments.runner import Runner
from hilora.experiments.worker import Place
from hilora.federated.callbacks.checkpoint import PREVIOUS, load_checkpoint
from tests.experiments.conftest import SMALL, Write

pytestmark = pytest.mark.slow

FIRST = "groups.hilora.final0"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with connected("local", 2, "cpu") as client:
        client.run(lambda: setattr(importlib.import_module("hilora.reporting.plots"), "draw_run", lambda *given: None))
        yield client  # without the pictures of runs, which take their time


def place(experiment: Experiment, folder: Path) -> Place:
    return Place(experiment.model, folder, folder / "work", "cpu")


def run(
    client: Client, experiment: Experiment, folder: Path, say: Callable[[str], object], first: int | None = None
) -> Runner:
    client.wait_for_workers(2)  # where a test before has lost one
    crew = Cluster(client, place(experiment, folder), [setting for setting, _ in experiment.pairs], say)
    runner = Runner(experiment, Ledger(folder / "ledger.jsonl"), crew, say)
    runner.run(experiment.pairs[:first])
    return runner


def results(path: Path) -> dict[str, Any]:
    """What a ledger says of every run, but for when, where and in how many seconds it was trained."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {json.dumps(line["key"]): {**line, "device": "", "date": "", "revision": ""} for line in lines}
    assert len(found) == len(lines)
    for line in found.values():
        line["results"]["seconds"] = 0
    return found


@contextmanager
def killer(begins: str, times: int) -> Iterator[list[Path]]:
    """Kills the worker of a run, so often as it gets through its first round; the folders of these runs."""
    killed: list[Path] = []
    over = threading.Event()

    def at(process: psutil.Process) -> Path | None:
        """The folder of the run that a worker is at: it has the log open until the run has ended."""
        with suppress(psutil.Error):  # it has just ended
            for folder in [Path(file.path).parent for file in process.open_files() if file.path.endswith("/log.txt")]:
                if folder.name.startswith(begins) and (folder / PREVIOUS).exists():
                    return folder
        return None

    def kill(process: psutil.Process) -> None:
        if at(process) is None:
            return
        process.suspend()  # so that the run does not end between the look and the shot
        folder = at(process)
        if folder is None:
            process.resume()
            return
        process.kill()
        killed.append(folder)
        while at(process) is not None:
            time.sleep(0.01)

    def work() -> None:
        while len(killed) < times and not over.wait(0.01):
            for process in psutil.Process().children():
                if len(killed) < times:
                    kill(process)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_eight_runs_on_two_workers_of_which_one_is_killed_are_those_of_one_machine(
    client: Client, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    experiment = write(("seeds = [0, 1]", "seeds = [0, 1, 2]"))
    with killer("groups.", 1) as killed:
        assert run(client, experiment, tmp_path, said.append).failed == []
    assert len(killed) == 1
    assert said[:2] == ["2 workers", "Small: 8 runs to do"]
    assert said[-1].endswith("0 runs left")
    rounds = [json.loads(line)["round"] for line in (killed[0] / "metrics.jsonl").read_text().splitlines()]
    assert rounds == [1, 2]
    assert not list(tmp_path.rglob("*.safetensors"))

    monkeypatch.setattr("hilora.reporting.plots.draw_run", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, CPU_COUNT // 2))  # as each of the workers has
    try:
        assert main(["run", "small.toml", "--device", "cpu"]) == 0
    finally:
        torch.set_num_threads(threads)
    assert results(tmp_path / "ledger.jsonl") == results(tmp_path / "small.ledger.jsonl")


def test_the_command_starts_workers_and_ends_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(SMALL)
    before = psutil.Process().children()
    assert main(["run", "small.toml", "--on", "local", "--workers", "2", "--device", "cpu", "--only", "mixed"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines()[:2] == ["2 workers", "Small: 2 runs to do"]
    assert captured.err == ""
    assert len(Ledger(tmp_path / "small.ledger.jsonl").lines) == 2
    assert set(psutil.Process().children()) <= set(before)


def test_final_runs_follow_the_choice_of_tuning_and_failures_are_told(
    client: Client, tuned: Experiment, write: Write, tmp_path: Path
) -> None:
    said: list[str] = []
    text = tuned.path.read_text().replace("clients = 4\n", "clients = 4000\n").replace('"float32"', '"auto"')
    text = text.replace("seeds = [0, 1]", "seeds = [0]")
    experiment = write(text=text.replace("[tuning]\nseed = 100\nclients = 3", "[tuning]\nseed = 100"))
    runner = run(client, experiment, tmp_path, said.append)
    assert len(runner.failed) == 4
    assert all(re.match(r"mixed/\w+ tuning seed 100", title) for title in runner.failed)
    assert sum(text.startswith("FAILED mixed/") and "PartitionError" in text for text in said) == 4
    logs = [path.read_text() for path in (tmp_path / "work").glob("mixed.*/log.txt")]
    assert all("Traceback" in text for text in logs)
    lines = Ledger(tmp_path / "ledger.jsonl").lines
    assert len({line["dtype"] for line in lines}) == 1
    for method in ("hilora", "fedit"):
        purposes = [line["key"]["purpose"] for line in lines if line["key"]["method"] == method]
        assert purposes == ["tuning", "tuning", "final"]


def test_a_run_that_loses_its_workers_again_and_again_is_given_up_and_the_others_go_on(
    client: Client, write: Write, tmp_path: Path
) -> None:
    assert isinstance(client.cluster, SpecCluster)
    client.cluster.scheduler.allowed_failures = 1
    said: list[str] = []
    with killer(FIRST, 2) as killed:
        experiment = write(("rounds = [1, 1, 0]", "rounds = [4, 0, 0]"), ("seeds = [0, 1]", "seeds = [0]"))
        runner = run(client, experiment, tmp_path, said.append, first=2)
    assert len(killed) == 2
    assert runner.failed == ["groups/hilora final seed 0"]
    assert any("2 workers were lost while they trained it" in text for text in said)
    assert [line["key"]["method"] for line in runner.ledger.lines] == ["fedit"]


def test_ctrl_c_stops_the_runs_of_the_workers_and_the_same_command_goes_on(
    client: Client, write: Write, tmp_path: Path
) -> None:
    experiment = write(
        ("rounds = [1, 1, 0]", "rounds = [60, 0, 0]"),
        ("[methods.fedit]", "[methods.fedit]\nrun = { rounds = [1, 0, 0] }"),
        ("seeds = [0, 1]", "seeds = [0]"),
    )

    def stop(text: str) -> None:
        if text.startswith("groups/fedit"):
            while not list((tmp_path / "work").glob(f"{FIRST}.*/{PREVIOUS}")):
                time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(client, experiment, tmp_path, stop, first=2)
    assert [line["key"]["method"] for line in Ledger(tmp_path / "ledger.jsonl").lines] == ["fedit"]
    deadline = time.monotonic() + 300
    while any(client.run(lambda dask_worker: bool(dask_worker.state.executing)).values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    (folder,) = (tmp_path / "work").glob(f"{FIRST}.*")
    assert "Unwanted" in (folder / "log.txt").read_text()
    done = load_checkpoint(folder)["round"]
    assert done < 60
    before = (folder / "metrics.jsonl").read_text()

    assert len(run(client, experiment, tmp_path, print, first=1).ledger.lines) == 2
    assert (folder / "metrics.jsonl").read_text().startswith(before)


def test_a_worker_without_the_data_is_named(client: Client, write: Write, tmp_path: Path) -> None:
    experiment = write(('data = "glyphs"\npartition = "sc-dir"', 'data = "cifar"\npartition = "sc-dir"'))
    with pytest.raises(ResourceError, match=r"the worker tcp://.* cannot be used: .* does not hold cifar"):
        run(client, experiment, tmp_path, print)


def test_a_scheduler_without_workers_is_waited_for_and_one_that_goes_away_is_told(write: Write, tmp_path: Path) -> None:
    said: list[str] = []
    options = {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": ":0"}
    scheduler = SpecCluster({}, {"cls": Scheduler, "options": options}, silence_logs=50)
    experiment = write()
    with connected(scheduler.scheduler_address, None, None) as client:
        crew = Cluster(client, place(experiment, tmp_path), [], said.append)
        timer = threading.Timer(1, scheduler.close)
        timer.start()
        with pytest.raises(ResourceError, match="the scheduler is gone"):
            Runner(experiment, Ledger(tmp_path / "ledger.jsonl"), crew, said.append).run(experiment.pairs)
        timer.join()
    assert said == [cluster.WAITING, "Small: 6 runs to do"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--on", "tcp://127.0.0.1:9"], "no Dask scheduler answers at tcp://127.0.0.1:9: .*Timed out"),
        (["--on", "nowhere"], "no Dask scheduler answers at nowhere: .*missing port"),
        (["--workers", "2"], "--workers is for --on local"),
        (["--on", "local", "--only", "none"], "--only none"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cluster, "PATIENCE", 1.0)
    (tmp_path / "small.toml").write_text(SMALL)
    assert main(["run", str(tmp_path / "small.toml"), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.match(f"error: {message}", captured.err)


def test_without_dask_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small.toml").write_text(SMALL)
    monkeypatch.delitem(sys.modules, "hilora.experiments.cluster")
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert main(["run", str(tmp_path / "small.toml"), "--on", "local"]) == 2
    assert capsys.readouterr().err == "error: --on needs distributed: pip install 'hilora[cluster]'\n"


def test_each_local_worker_has_a_gpu_and_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cluster, "CPU_COUNT", 8)
    monkeypatch.setattr(cluster, "SpecCluster", lambda workers, scheduler, silence_logs: workers)

    def workers(count: int | None, device: str | None) -> list[tuple[str | None, int]]:
        found: Any = cluster._local(count, device)
        options = [worker["options"] for worker in found.values()]
        return [(one["env"].get("CUDA_VISIBLE_DEVICES"), one["nthreads"]) for one in options]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    assert workers(None, None) == [("2", 4), ("5", 4)]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert workers(3, "cuda") == [("0", 2), ("1", 2), ("0", 2)]
    assert workers(None, "cpu") == [(None, 4), (None, 4)]
    assert workers(None, "cuda:1") == [(None, 4), (None, 4)]
