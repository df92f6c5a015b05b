"""A method that somebody wrote outside of the library: one class, with settings, a composition and a local algorithm of
its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

import hilora
from hilora.adapters.composition import Composition, Gains
from hilora.adapters.table import Values
from hilora.errors import InvalidTypeError, InvalidValueError
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.bench import Bench, LocalAlgorithm, Training
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.sgd import SGDTraining
from hilora.federated.protocol import Download, Stage, Upload, shared
from hilora.federated.settings import Number, Settings, Whole
from hilora.federated.strategies import STRATEGIES, Strategy, register
from hilora.federated.streams import stream
from tests.federated.conftest import Simulate, records
from tests.federated.test_resuming import Stop, stop_after, untimed
from tests.federated.test_simulation import FILES, figures

pytestmark = pytest.mark.slow


class Volume(Composition):
    """The root as loud as a number of each client says, which is trained."""

    trained = True

    def __init__(self, volume: Tensor) -> None:
        self.volume = volume  # [n]

    def tensors(self) -> dict[str, Tensor]:
        return {"volume": self.volume}

    def like(self, tensors: dict[str, Tensor]) -> Volume:
        return Volume(tensors["volume"])

    def gains(self, bank: int) -> Gains:
        return lambda position, x: {"root": self.volume[:, None].expand(x.shape[:2])}


@dataclass(frozen=True)
class SignSGD(LocalAlgorithm):
    """Steps along the sign of the gradient, shrunk by what the method's settings say."""

    shrink: float

    def training(self, bench: Bench) -> Training:
        return _SignTraining(bench, self.shrink)


class _SignTraining(SGDTraining):
    def __init__(self, bench: Bench, shrink: float) -> None:
        super().__init__(bench)
        self.shrink = shrink

    def _update(self, task: Tensor, gradients: Any) -> None:
        takes_part = (self.target >= 0).any(1)
        with torch.no_grad():
            for one, gradient in zip(self.bench.trained, gradients, strict=True):
                moves = takes_part.view([-1 if axis == one.dim else 1 for axis in range(one.parameter.dim())])
                one.parameter.sub_(self.shrink * one.lr * gradient.sign() * moves)
        self.loss += task.detach() * takes_part


class Loud(Strategy):
    """One adapter for all, whose volume is each client's own; a stage ends when the server has had enough of it."""

    class Settings(Settings):
        data: Whole = Field(1, description="has the name of something else in a run's identity")
        shrink: Number = Field(0.1, gt=0, description="of the steps")
        enough: Whole = Field(2, ge=1, description="rounds after which a stage stops")

    tiers = ("root",)
    own_tier = "root"
    settings: Settings

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.count = 0
        self._told = print  # no state: the checkpoint leaves it out

    def start(self) -> None:
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters"))
        self.head = self.problem.head

    def stages(self) -> list[Stage]:
        return [Stage("root", 5, "root", "first"), Stage("root", 5, "leaf", "second")]

    def begin(self, stage: Stage, clients: Tensor, ask: Any) -> None:
        self.count = 0

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": shared(self.root, clients)}, shared(self.head, clients))

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        assert upload.head is not None
        self.root, self.head = upload.tiers["root"].mean(upload.images), upload.head.mean(upload.images)
        self.count += 1
        return {"stop": True} if self.count == self.settings.enough else {}

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        models = self.models(state, download, trainer)
        how = SignSGD(self.settings.shrink)
        trained = trainer.train(models, "root", rates=download.stage.rates, algorithm=how)
        assert isinstance(trained.composition, Volume)
        state.put("volume", Values(volume=trained.composition.volume))
        return trained.upload("root")

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        kept = state.filled("volume", lambda: Values(volume=torch.ones(len(state.clients)))).taken()
        return replace(super().models(state, download, trainer), composition=Volume(kept["volume"]))


def test_it_runs_stops_its_stages_early_and_writes_its_summary(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate(Loud, shrink=0.2)
    summary = simulation.run()
    assert [record["round_in_stage"] for record in records(simulation)] == [1, 2, 1, 2]
    assert simulation.stage == 2
    assert {path.name for path in (tmp_path / "out").iterdir()} >= FILES
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["strategy"] == summary["strategy"] == "Loud"
    assert (written["config"]["shrink"], written["config"]["enough"]) == (0.2, 2)
    assert summary["rounds"] == 4
    assert summary["communication"]["up"] == 4 * (2 * 192 + 150)
    volume = simulation.store.tables["volume"].tensors()["volume"]
    assert len(volume[:5].unique()) > 1
    assert "volume" not in simulation.server.state_dict()


def test_it_is_stopped_and_resumed(simulate: Simulate, tmp_path: Path) -> None:
    whole = simulate(Loud, out=tmp_path / "whole")
    expected = figures(whole.run())
    for rounds in (1, 2, 3):
        stopped = simulate(Loud, resume=rounds > 1)
        stop_after(stopped, rounds)
        with pytest.raises(Stop):
            stopped.run()
        assert json.loads((tmp_path / "out" / "summary.json").read_text())["rounds"] == rounds
    resumed = simulate(Loud, resume=True)
    assert figures(resumed.run()) == expected
    assert untimed(resumed) == untimed(whole)
    for name, before, now in (("shrink", 0.1, 0.3), ("data", 1, 2)):
        with pytest.raises(ValueError, match=rf"Loud.{name} was {before}, now {now}"):
            simulate(Loud, resume=True, **{name: now})


def test_a_setting_with_the_name_of_one_that_all_share_is_refused(simulate: Simulate) -> None:
    class Twice(Loud):
        class Settings(Loud.Settings):
            batch_size: Whole = Field(3, description="of its own")

    with pytest.raises(InvalidValueError, match=r"batch_size is what all methods share"):
        simulate(Twice)


def test_what_cannot_be_in_a_checkpoint_is_said(simulate: Simulate) -> None:
    class Open(Loud):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            self.tell = print

    with pytest.raises(InvalidTypeError, match=r"a builtin_function_or_method .* begins with an underscore"):
        simulate(Open)


def test_its_algorithm_and_composition_take_part_in_the_result(simulate: Simulate, tmp_path: Path) -> None:
    def volumes(out: str, **options: Any) -> Tensor:
        simulation = simulate(Loud, out=tmp_path / out, enough=1, **options)
        simulation.run()
        return simulation.store.tables["volume"].tensors()["volume"][:5]

    small, large = volumes("small", shrink=0.01), volumes("large", shrink=0.1)
    assert (small - 1).abs().max() < (large - 1).abs().max()
    one = volumes("one", shrink=0.01, clients_at_once=1)
    torch.testing.assert_close(one, small, rtol=1e-3, atol=1e-4)


@pytest.fixture
def registered() -> Iterator[None]:
    before = dict(STRATEGIES)
    yield
    STRATEGIES.clear()
    STRATEGIES.update(before)


def test_it_can_be_registered_under_a_name_of_its_own(registered: None) -> None:
    class Named(Loud):
        name = "loud"

    assert register(Named) is Named
    assert register(Named) is Named  # twice is no matter
    assert STRATEGIES["loud"] is Named

    class Other(Loud):
        name = "fedit"

    with pytest.raises(InvalidValueError, match=r"Other is called 'fedit', as hilora\..*\.FedIT is"):
        register(Other)


FILE = """
from hilora.federated.strategies.fedit import FedIT


class Half(FedIT):
    name = "half"

    def aggregate(self, stage, upload):
        super().aggregate(stage, upload)
        self.head = self.head.each(lambda value: value / 2)
        return {}
"""
PROGRAM = """
from pathlib import Path
import hilora
from hilora.federated.strategies import STRATEGIES, resolve
print(Path(hilora.__file__).parent, resolve("half").name, list(STRATEGIES).count("half"))
"""


def test_a_new_file_in_the_folder_of_strategies_is_all_that_it_takes(tmp_path: Path) -> None:
    package = tmp_path / "hilora"
    shutil.copytree(Path(hilora.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "federated" / "strategies" / "half.py").write_text(FILE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM]
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == [str(package), "half", "1"]
