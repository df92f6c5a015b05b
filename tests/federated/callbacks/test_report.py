"""What a run leaves to look at, and the figures that are there for it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest

from hilora.adapters.io.files import read_tensors
from hilora.federated.callbacks.report import RESULTS
from hilora.reporting.summary import PHASES, read_summary
from tests.federated.conftest import Simulate, records
from tests.federated.test_resuming import Stop, stop_after

pytestmark = pytest.mark.slow

FEW: dict[str, Any] = {"rounds": [2, 1, 1]}


def embedded(out: Path) -> dict[str, Any]:
    """What charts say on the page of a run."""
    found: dict[str, Any] = json.loads((out / "report.html").read_text().split('id="data">')[1].split("</script>")[0])
    return found


def test_the_page_shows_the_run_that_lies_beside_it(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate(gamma_root=0.5, **FEW)
    simulation.run()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {name for name in RESULTS if "*" not in name}
    text, summary, found = (out / "report.html").read_text(), read_summary(out / "summary.json"), embedded(out)
    assert "<h1>hilora on squares, by hand, seed 0</h1>" in text
    assert "<dt>gamma root</dt><dd>0.5</dd>" in text
    assert "<dt>rounds</dt><dd>root 2, cluster 1, leaf 1</dd>" in text
    assert "<dt>gamma cluster</dt>" not in text  # a default
    assert [point["text"].split(":")[0] for point in found["rounds"]] == [
        *("round 1, root", "round 2, root", "round 3, cluster", "round 4, leaf")
    ]
    assert sorted(point["row"] for point in found["clients"]) == ["0", "1", "2", "3", "4", "5"]
    (client,) = (point["text"] for point in found["clients"] if point["row"] == "2")
    place = summary["per_client"]["ids"].index(2)
    before, after = summary["per_client_by_tier"]["root"][place], summary["per_client"]["test"][place]
    assert f"client 2, seen, c, cluster {summary['clusters']['labels'][place]}: {100 * after:.1f} %" in client
    assert f"before {100 * before:.1f} %" in client


def test_accuracies_of_each_tier_are_those_of_its_last_round(simulate: Simulate) -> None:
    simulation = simulate(**FEW)
    summary = simulation.run()
    by_tier = summary["per_client_by_tier"]
    assert list(by_tier) == ["root", "cluster", "leaf"]
    assert by_tier["leaf"] == summary["per_client"]["test"]
    for tier, values in by_tier.items():
        assert sum(values) / len(values) == pytest.approx(summary["tiers"][tier]["mean"])


def test_rounds_tell_what_was_moved_until_then(simulate: Simulate) -> None:
    """On the mean over seen clients; what a stage asks before its first round is in that."""
    simulation = simulate(**FEW)
    summary = simulation.run()
    seen = summary["per_client"]["ids"]
    for way in ("up", "down"):
        moved = [record[way] for record in records(simulation)]
        assert moved == sorted(moved)
        whole = summary["communication"]["per_client"][way]
        assert moved[-1] == pytest.approx(sum(whole[client] for client in seen) / len(seen))
        assert summary["communication"][way] == pytest.approx(moved[-1] / 4)
    assert records(simulation)[-1]["up"] == records(simulation)[-2]["up"]  # nobody sends a leaf


def test_phases_are_the_parts_of_the_time(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that goes on by one second whenever it is looked at."""
    ticks = iter(range(10**6))
    monkeypatch.setattr("hilora.federated.loop.time.perf_counter", lambda: float(next(ticks)))
    simulation = simulate(**FEW)
    summary = simulation.run()
    phases = summary["seconds_by_phase"]
    assert tuple(phases) == PHASES
    assert phases == {"train": 4, "evaluate": 4 + 1, "group": 3, "write": 1 + 2 * 4 + 1}
    assert summary["seconds"] == 4 + 5 + 3
    assert summary["images_per_second"] == summary["images"] / 4
    assert [record["seconds"] for record in records(simulation)] == [2, 2, 2, 2]


def test_resuming_adds_up_the_phases(simulate: Simulate, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(10**6))
    monkeypatch.setattr("hilora.federated.loop.time.perf_counter", lambda: float(next(ticks)))
    stopped = simulate(**FEW)
    stop_after(stopped, 3)
    with pytest.raises(Stop):
        stopped.run()
    resumed = simulate(resume=True, **FEW)
    assert resumed.phases["train"] == 3
    phases = resumed.run()["seconds_by_phase"]
    assert (phases["train"], phases["evaluate"]) == (4, 5)
    assert phases["group"] in (3, 4)  # a stage may have to begin again


@pytest.mark.parametrize("rounds", [0, 3])
def test_an_interrupted_run_has_a_page(simulate: Simulate, tmp_path: Path, rounds: int) -> None:
    stopped = simulate(**FEW)
    stop_after(stopped, rounds)
    with pytest.raises(Stop):
        stopped.run()
    text = (tmp_path / "out" / "report.html").read_text()
    assert "This run was interrupted" in text
    assert ("No round has been trained." in text) == (rounds == 0)
    assert len(embedded(tmp_path / "out")["rounds"]) == rounds


@pytest.mark.parametrize(
    "broken", ["hilora.federated.callbacks.report.run_page", "hilora.reporting.plots.plot_accuracy"]
)
def test_what_was_trained_outlives_a_failure_to_draw(
    simulate: Simulate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: str,
) -> None:
    def fails(*given: Any) -> None:
        raise ZeroDivisionError("a bug of the drawing")

    monkeypatch.setattr(broken, fails)
    with caplog.at_level(logging.ERROR):
        summary = simulate(**FEW).run()
    assert summary["final"]["mean"] is not None
    assert read_summary(tmp_path / "out" / "summary.json")["rounds"] == 4
    assert read_tensors(tmp_path / "out" / "heads.safetensors")[0]
    assert re.search("could not be made", caplog.text)
    assert "a bug of the drawing" in caplog.text
