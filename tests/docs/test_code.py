"""The code in the documentation: Python runs, commands parse."""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import pytest
import timm
import torch

import hilora
from hilora.experiments.spec import read_experiment
from hilora.federated.data.partitions import PARTITIONS
from hilora.federated.data.readers import READERS
from hilora.federated.strategies import STRATEGIES
from hilora.reporting.progress import Progress
from tests.docs.pages import PAGES, ROOT, blocks, commands, program

pytestmark = pytest.mark.slow

WITH_CODE = [page for page in PAGES if program(page)]
INSIDE = ("hilora/", "kernels/")  # titles of files that a reader would put into the library


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory that looks like a clone; what a page registers or imports is forgotten after it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("benchmarks", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    registries: list[dict[str, Any]] = [STRATEGIES, PARTITIONS, READERS]
    before, modules = [dict(registry) for registry in registries], set(sys.modules)
    yield tmp_path
    for registry, names in zip(registries, before, strict=True):
        registry.clear()
        registry.update(names)
    for name in set(sys.modules) - modules:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == tmp_path:
            del sys.modules[name]


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded: pretrained weights are random ones, the same in every model of a name."""
    create = timm.create_model

    def create_model(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
        with torch.random.fork_rng():
            if pretrained:
                torch.manual_seed(0)
            model: torch.nn.Module = create(name, **options)
            return model

    monkeypatch.setattr(timm, "create_model", create_model)


class MLflow(ModuleType):
    """Stands in for mlflow, and keeps what it is told: for each run its metrics by step, and how it ended."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.ended: list[tuple[str, str]] = []
        self.active = ""

    def start_run(self, run_id: str | None, run_name: str) -> SimpleNamespace:
        self.active = run_id or f"{run_name}-{len(self.runs)}"
        self.runs.setdefault(self.active, {})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.active))

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        assert all(isinstance(value, int | float) for value in metrics.values())
        self.runs[self.active][step] = metrics

    def end_run(self, status: str) -> None:
        self.ended.append((self.active, status))


@pytest.fixture
def mlflow(monkeypatch: pytest.MonkeyPatch) -> MLflow:
    module = MLflow()
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def write_files(page: str, folder: Path) -> None:
    for block in blocks(page):
        if block.title:
            path = folder / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)


def test_pages_with_code_are_found() -> None:
    assert {"README.md", "docs/quick-start.md", "docs/guides/adapters.md", "docs/how-to/operation.md"} <= set(WITH_CODE)
    assert "hilora.inject(" in program("README.md")


@pytest.mark.parametrize(
    "page", [page for page in WITH_CODE if not any(b.title.startswith(INSIDE) for b in blocks(page))]
)
def test_python_runs_and_prints_what_the_page_says(
    page: str,
    place: Path,
    offline: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "import mlflow" in program(page):  # elsewhere libraries would take the stand-in for what it stands for
        request.getfixturevalue("mlflow")
    monkeypatch.setattr(timm.layers.config, "_USE_FUSED_ATTN", 1)  # a page may change it
    write_files(page, place)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(program(page), ROOT / page, "exec"), vars(module))
    printed = capsys.readouterr().out
    for block in blocks(page):
        if block.language == "text":
            assert block.text in printed


def test_the_tracker_of_the_page_of_callbacks_tracks(
    place: Path, mlflow: MLflow, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    exec(compile(program("docs/how-to/callback.md"), "callback.md", "exec"), vars(module))

    def simulation(resume: bool) -> Any:
        given = (module.load_backbone("glyph_vit"), module.train, module.test, module.population, Path("tracked"))
        callbacks = [module.MLflow()]
        return module.Simulation(
            "hilora", module.settings, *given, torch.device("cpu"), resume=resume, callbacks=callbacks
        )

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a command in the background ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    stopped = simulation(resume=False)
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "round", lambda self, record: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            stopped.run()
    simulation(resume=True).run()
    ((run, rounds),) = mlflow.runs.items()
    assert mlflow.ended == [(run, "KILLED"), (run, "FINISHED")]
    assert list(rounds) == [1, 2, 3]
    lines = [json.loads(line) for line in Path("tracked/metrics.jsonl").read_text().splitlines()]
    assert [metrics["loss"] for metrics in rounds.values()] == pytest.approx([line["loss"] for line in lines])
    assert rounds[3]["test/mean"] == pytest.approx(lines[2]["test"]["mean"])


@pytest.mark.parametrize("page", [page for page in WITH_CODE if any(b.title.startswith(INSIDE) for b in blocks(page))])
def test_files_for_the_library_run_in_a_copy_of_it(page: str, tmp_path: Path) -> None:
    library = Path(hilora.__file__).parent
    shutil.copytree(library, tmp_path / "hilora", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kernels").symlink_to(tmp_path / "hilora" / "kernels")
    write_files(page, tmp_path)
    (tmp_path / "page.py").write_text(program(page))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "page.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_experiments_can_be_read(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("docs/experiments.md") if block.language == "toml")
    (tmp_path / "page.toml").write_text(block.text)
    experiment = read_experiment(tmp_path / "page.toml")
    assert [(setting.name, method.name) for setting, method in experiment.pairs] == [
        ("sc-dir", "hilora"),
        ("sc-dir", "fedit"),
        ("sc-dir", "ifca"),
    ]


class Parsed(Exception):
    """The arguments of a command are right."""


COMMANDS = [(page, command) for page in PAGES for command in dict.fromkeys(commands(page)) if "PART " not in command]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize(("page", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_commands_parse(page: str, command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(page, place)
    program, *arguments = shlex.split(command)
    if program in ("pip", "pytest"):
        return  # theirs to say
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        known = re.findall(r"^([\w-]+):", makefile, re.MULTILINE)
        known += [f"{name}=" for name in re.findall(r"\$\((\w+)\)", makefile)]
        assert {re.sub("=.*", "=", argument) for argument in arguments} <= set(known)
        return
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> NoReturn:
        parse(self, *given)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    if program == "hilora":
        arguments = ["-m", "hilora", *arguments]
    runs_module = arguments[0] == "-m"
    name, *rest = arguments[1:] if runs_module else arguments
    monkeypatch.setattr(sys, "argv", [name, *rest])
    run = partial(runpy.run_module, name) if runs_module else partial(runpy.run_path, str(ROOT / name))
    with pytest.raises(Parsed):
        run(run_name="__main__")
