"""A callback that somebody wrote."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.protocol import Stage
from hilora.federated.simulation import Simulation
from tests.federated.conftest import Simulate
from tests.federated.test_resuming import Stop, stop_after
from tests.federated.test_simulation import FILES, figures

pytestmark = pytest.mark.slow


class Diary(Callback):
    """Notes all that it sees, and how many images were trained on."""

    name = "diary"

    def __init__(self, fails: str = "") -> None:
        self.seen: list[str] = []
        self.images = torch.zeros((), dtype=torch.long)
        self.fails = fails

    def _note(self, hook: str, what: object = "") -> None:
        self.seen.append(f"{hook} {what}".strip())
        if self.fails == self.seen[-1]:
            raise ZeroDivisionError("a bug of the callback")

    def begin(self, simulation: Simulation) -> None:
        self._note("begin", simulation.round)

    def stage_begun(self, simulation: Simulation, stage: Stage) -> None:
        self._note("stage", stage.tier)

    def measure(self, simulation: Simulation, round: Round) -> None:
        round.record["mine"] = simulation.round
        self._note("measure", round.record["round"])

    def commit(self, simulation: Simulation, round: Round) -> None:
        self.images = self.images + round.record["images"]
        self._note("commit", f"{round.record['round']}{' last' if round.last else ''}")

    def trained(self, simulation: Simulation) -> None:
        self._note("trained")

    def end(self, simulation: Simulation) -> None:
        self._note("end", simulation.round)

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
        return {"diary": {"images": int(self.images)}}

    def state_dict(self) -> dict[str, Any]:
        return {"images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.images = state["images"]


FEW = {"rounds": [2, 0, 1]}


def test_it_sees_the_beginning_the_stages_the_rounds_and_the_end(simulate: Simulate, tmp_path: Path) -> None:
    diary = Diary()
    summary = simulate(callbacks=[diary], **FEW).run()
    assert diary.seen == [
        *("begin 0", "stage root", "measure 1", "commit 1", "measure 2", "commit 2 last", "stage cluster"),
        *("stage leaf", "measure 3", "commit 3 last", "trained", "end 3"),
    ]
    assert summary["diary"] == {"images": summary["images"]}
    out = tmp_path / "out"
    assert json.loads((out / "summary.json").read_text())["diary"] == summary["diary"]
    lines = [json.loads(line)["mine"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines == [0, 1, 2]  # a round does not count before it was measured


def test_its_state_survives_resuming(simulate: Simulate, tmp_path: Path) -> None:
    expected = figures(simulate(callbacks=[Diary()], out=tmp_path / "whole", **FEW).run())
    stopped = simulate(callbacks=[Diary()], **FEW)
    stop_after(stopped, 2)
    with pytest.raises(Stop):
        stopped.run()
    diary = Diary()
    assert figures(simulate(callbacks=[diary], resume=True, **FEW).run()) == expected
    assert diary.seen[0] == "begin 2"
    assert "commit 2 last" not in diary.seen


def test_a_run_may_go_on_with_a_callback_that_is_new_to_it(simulate: Simulate) -> None:
    stopped = simulate(**FEW)
    stop_after(stopped, 1)
    with pytest.raises(Stop):
        stopped.run()

    class New(Callback):
        name = "new"

        def load_state_dict(self, state: Mapping[str, Any]) -> None:
            assert state == {}

    assert simulate(callbacks=[New()], resume=True, **FEW).run()["interrupted"] is False


@pytest.mark.parametrize("fails", ["begin 0", "stage leaf", "measure 2", "commit 2 last", "trained"])
def test_what_it_raises_keeps_its_traceback_and_results_so_far_are_written(
    simulate: Simulate, tmp_path: Path, fails: str
) -> None:
    expected = figures(simulate(callbacks=[Diary()], out=tmp_path / "whole", **FEW).run())
    with pytest.raises(ZeroDivisionError, match="a bug of the callback") as caught:
        simulate(callbacks=[Diary(fails)], **FEW).run()
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "_note"
    assert not getattr(caught.value, "__notes__", [])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    rounds = {"begin 0": 0, "stage leaf": 2, "measure 2": 1, "commit 2 last": 1, "trained": 3}[fails]
    assert (summary["interrupted"], summary["rounds"]) == (True, rounds)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == rounds
    assert figures(simulate(callbacks=[Diary()], resume=True, **FEW).run()) == expected


def test_an_error_in_its_end_keeps_no_other_from_writing(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug of the callback"):
        simulate(callbacks=[Diary("end 3")], **FEW).run()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= FILES
    assert json.loads((out / "summary.json").read_text())["interrupted"] is False
