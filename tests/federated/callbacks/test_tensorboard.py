"""What TensorBoard reads of a run is what `metrics.jsonl` says, each round once."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hilora.cli.main import main
from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.callbacks.tensorboard import TensorBoard
from hilora.federated.simulation import Simulation
from tests.federated.conftest import Simulate, records

pytestmark = pytest.mark.slow

SMALL = ["--clients", "4", "--images-per-client", "8", "--rounds", "1,1,0", "--rank", "2", "--dtype", "float32"]


class Breaks(Callback):
    """An error once a round is written, before it counts."""

    def commit(self, simulation: Simulation, round: Round) -> None:
        if round.record["round"] == 4:
            raise ZeroDivisionError


def read(folder: Path) -> dict[str, dict[int, float]]:
    """The points of each scalar by step; no step is there twice."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found = {}
    for name in events.Tags()["scalars"]:
        points = events.Scalars(name)
        found[name] = {point.step: point.value for point in points}
        assert len(found[name]) == len(points)
    return found


def test_every_round_is_there_once_also_of_a_run_that_was_stopped_and_goes_on(
    simulate: Simulate, tmp_path: Path
) -> None:
    with pytest.raises(ZeroDivisionError):
        simulate(callbacks=[TensorBoard(), Breaks()]).run()
    assert list(read(tmp_path / "out")["loss"]) == [1, 2, 3, 4]
    resumed = simulate(callbacks=[TensorBoard()], resume=True)
    resumed.run()
    found, lines = read(tmp_path / "out"), records(resumed)
    assert [line["round"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "images", "up", "seconds"):
        expected = {line["round"]: line[name] for line in lines}
        assert {step: found[name][step] for step in expected} == pytest.approx(expected)
    measured = {line["round"]: line["test"]["mean"] for line in lines if line["test"]["mean"] is not None}
    assert found["test/mean"] == pytest.approx(measured)
    assert not {"round", "stage", "round_in_stage"} & set(found)


def test_the_flag_writes_into_the_folder_of_each_run_and_a_new_run_sets_it_aside(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = ["train", *SMALL, "--strategy", "hilora", "fedit", "--out", str(out), "--quiet"]
    assert main([*command, "--tensorboard"]) == 0
    for name in ("hilora", "fedit"):
        assert list(read(out / name)["loss"]) == [1, 2]
    assert main(command) == 0
    assert not list(out.glob("*/events*"))
    assert len(list(out.glob("*/earlier-1/events*"))) == 2


def test_without_tensorboard_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    assert main(["train", *SMALL, "--tensorboard", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: TensorBoard needs tensorboard: pip install 'hilora[tensorboard]'\n"
