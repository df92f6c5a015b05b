"""Runs that are stopped, and go on where they were."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hilora.errors import FileError, MissingFileError
from hilora.federated.archive import packed, unpacked
from hilora.federated.callbacks.checkpoint import CHECKPOINT, PREVIOUS
from hilora.federated.data.images import ImageSet
from hilora.federated.grouping import GROUPINGS
from hilora.federated.simulation import Simulation
from hilora.federated.strategies import STRATEGIES
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, records, same, squares
from tests.federated.test_simulation import FILES, figures

pytestmark = pytest.mark.slow


class Stop(KeyboardInterrupt):
    pass


def stop_after(simulation: Simulation, rounds: int) -> None:
    """Press Ctrl-C in the training or evaluation of the round after `rounds`."""
    engine = simulation.engine

    def stopping(work: Any) -> Any:
        def stop_or(*args: Any) -> Any:
            if simulation.round == rounds:
                raise Stop
            return work(*args)

        return stop_or

    engine.train, engine.evaluate = stopping(engine.train), stopping(engine.evaluate)  # type: ignore[method-assign]


def untimed(simulation: Simulation) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records(simulation)]


@pytest.mark.parametrize("rounds", [0, 1, 3, 4, 6])
@pytest.mark.parametrize("participation", [1.0, 0.5])
def test_a_stopped_run_leaves_its_results_and_resumes_where_it_was(
    simulate: Simulate, tmp_path: Path, rounds: int, participation: float
) -> None:
    whole = simulate(out=tmp_path / "whole", participation=participation)
    expected = figures(whole.run())
    stopped = simulate(participation=participation)
    stop_after(stopped, rounds)
    with pytest.raises(Stop):
        stopped.run()
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= FILES
    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"] is True
    assert summary["rounds"] == rounds == len((out / "metrics.jsonl").read_text().splitlines())
    assert (summary["final"]["mean"] is None) == (rounds == 0)
    resumed = simulate(participation=participation, resume=True)
    assert figures(resumed.run()) == expected
    assert untimed(resumed) == untimed(whole)


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_resumes_to_the_bit(simulate: Simulate, tmp_path: Path, strategy: str) -> None:
    """Stopped after each of the first rounds, traffic, private states and all are as if nothing had happened."""
    options = {"rounds": [2, 1, 1], "participation": 0.6, "augment": True}
    whole = simulate(strategy, out=tmp_path / "whole", **options)
    expected = figures(whole.run())
    for number in (1, 2, 3):
        simulation = simulate(strategy, resume=number > 1, **options)
        stop_after(simulation, number)
        with pytest.raises(Stop):
            simulation.run()
    resumed = simulate(strategy, resume=True, **options)
    assert figures(resumed.run()) == expected
    assert untimed(resumed) == untimed(whole)
    everyone = torch.arange(6)
    one, other = (run.models(everyone) for run in (whole, resumed))
    assert all(same(one.tiers[tier].taken(), other.tiers[tier].taken()) for tier in one.tiers)
    assert same(one.head.taken(), other.head.taken())
    assert whole.store.tables.keys() == resumed.store.tables.keys()
    assert all(same(table, resumed.store.tables[name]) for name, table in whole.store.tables.items())


@pytest.mark.parametrize("groups", list(GROUPINGS))
@pytest.mark.parametrize("strategy", ["hilora", "head-only"])
def test_every_grouping_resumes_to_the_bit(simulate: Simulate, tmp_path: Path, strategy: str, groups: str) -> None:
    expected = figures(simulate(strategy, out=tmp_path / "whole", groups=groups, participation=0.8).run())
    for rounds in (1, 3):
        stopped = simulate(strategy, groups=groups, participation=0.8, resume=rounds > 1)
        stop_after(stopped, rounds)
        with pytest.raises(Stop):
            stopped.run()
    assert figures(simulate(strategy, groups=groups, participation=0.8, resume=True).run()) == expected


def test_what_ended_a_run_is_raised_even_where_its_checkpoint_is_gone(simulate: Simulate, tmp_path: Path) -> None:
    stopped = simulate()
    stop_after(stopped, 1)
    train = stopped.engine.train

    def lost(*args: Any) -> Any:
        for name in (CHECKPOINT, PREVIOUS):
            (tmp_path / "out" / name).unlink(missing_ok=True)
        return train(*args)

    stopped.engine.train = lost  # type: ignore[method-assign, assignment]
    with pytest.raises(Stop) as ended:
        stopped.run()
    assert "could not be written: there is no checkpoint" in ended.value.__notes__[0]


def test_resuming_a_finished_run_changes_nothing(simulate: Simulate) -> None:
    first = figures(simulate().run())
    assert figures(simulate(resume=True).run()) == first


@pytest.mark.parametrize("strategy", ["hilora", "fedit", "feddpa-f", "fedalt", "ifca"])
def test_a_finished_run_goes_on_as_if_it_had_been_asked_for_more_rounds(
    simulate: Simulate, tmp_path: Path, strategy: str
) -> None:
    asked: dict[str, Any] = {"participation": 0.8, "evaluate_every": 1}
    whole = simulate(strategy, out=tmp_path / "whole", rounds=[2, 2, 4], **asked)
    expected = figures(whole.run())
    simulate(strategy, rounds=[2, 2, 1], **asked).run()
    stopped = simulate(strategy, rounds=[2, 2, 3], resume=True, **asked)
    stop_after(stopped, 6)
    with pytest.raises(Stop):
        stopped.run()
    resumed = simulate(strategy, rounds=[2, 2, 4], resume=True, **asked)
    assert figures(resumed.run()) == expected
    assert untimed(resumed) == untimed(whole)


def test_rounds_that_are_over_cannot_become_more_or_fewer(simulate: Simulate) -> None:
    simulate(rounds=[2, 1, 2]).run()
    for rounds in ([3, 1, 2], [2, 2, 2], [2, 1, 1], [2, 1, 0]):
        with pytest.raises(FileError, match="rounds was"):
            simulate(rounds=rounds, resume=True)
    (simulate(rounds=[2, 1, 2], resume=True).out / PREVIOUS).unlink()
    with pytest.raises(FileError, match="rounds was"):
        simulate(rounds=[2, 1, 3], resume=True)


@pytest.mark.parametrize(
    "change",
    [{"seconds_by_phase": None}, {"stage": "x"}, {"strategy": None}, {"store": {}}, {"callbacks": []}, {"identity": 3}],
)
def test_a_checkpoint_with_other_parts_is_no_bug(simulate: Simulate, tmp_path: Path, change: dict[str, Any]) -> None:
    simulate(rounds=[1, 0, 0]).run()
    path = tmp_path / "out" / CHECKPOINT
    path.write_bytes(packed({**unpacked(path), **change}))
    path.with_name(PREVIOUS).unlink()
    with pytest.raises(FileError, match=CHECKPOINT):
        simulate(rounds=[1, 0, 0], resume=True)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(simulate: Simulate, tmp_path: Path) -> None:
    whole = figures(simulate(out=tmp_path / "whole").run())
    stopped = simulate()
    stop_after(stopped, 4)
    with pytest.raises(Stop):
        stopped.run()
    path = tmp_path / "out" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:-100])
    resumed = simulate(resume=True)
    assert resumed.round == 3
    assert figures(resumed.run()) == whole


def swapped(backbone: Backbone) -> Backbone:
    """The same but for two weights that have changed places: a sum would not tell."""
    other = copy.deepcopy(backbone)
    with torch.no_grad():
        bias = next(value for name, value in other.model.named_parameters() if name.endswith("proj.bias"))
        bias[:2] = torch.tensor([0.25, 0.5])
    return other


def test_resuming_another_run_is_refused_and_what_differs_is_named(
    simulate: Simulate, backbone: Backbone, tmp_path: Path
) -> None:
    def refused(says: str, strategy: str = "hilora", **options: Any) -> None:
        with pytest.raises(FileError, match=says) as caught:
            simulate(strategy, **{"rounds": [1, 0, 0], **options, "resume": True})
        assert str(caught.value).count(" was ") == 1 or strategy != "hilora"

    first = swapped(backbone)
    simulate(rounds=[1, 0, 0], backbone=first).run()
    other = copy.deepcopy(first)
    with torch.no_grad():
        bias = next(value for name, value in other.model.named_parameters() if name.endswith("proj.bias"))
        bias[:2] = torch.tensor([0.5, 0.25])
    refused("backbone was", backbone=other)
    refused("batch_size was 4, now 3", batch_size=3, backbone=first)
    refused("gamma_root was 0.1, now 0.2", gamma_root=0.2, backbone=first)
    refused("strategy was 'hilora', now 'fedit'", "fedit", backbone=first)
    refused("dtype was 'float32', now 'bfloat16'", dtype=torch.bfloat16, backbone=first)
    refused("clients was", sizes=[12, 9, 12, 5, 7, 8], backbone=first)
    refused("data was", images=(renamed(squares(120, 1)), squares(42, 2)), backbone=first)
    simulate(rounds=[1, 0, 0], backbone=first, clients_at_once=5, resume=True).run()  # this one changes no result
    with pytest.raises(MissingFileError, match="without --resume"):
        simulate(out=tmp_path / "nowhere", resume=True)
    for name in (CHECKPOINT, PREVIOUS):
        (tmp_path / "out" / name).write_bytes(b"no checkpoint")
    with pytest.raises(FileError, match=f"{CHECKPOINT} is not readable"):
        simulate(rounds=[1, 0, 0], backbone=first, resume=True)


def renamed(images: ImageSet) -> ImageSet:
    return ImageSet(images.images, images.labels, images.classes, "other squares", images.groups, images.group_names)


@pytest.mark.parametrize("which", ["train", "val", "test"])
def test_clients_that_have_traded_images_are_another_population(
    simulate: Simulate, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """As many images each, and of the same sum."""
    from tests.federated import conftest

    simulate("fedit", rounds=[1, 0, 0]).run()
    whole = conftest.population

    def traded(*given: Any) -> Any:
        people = whole(*given)
        first = getattr(people.clients[0], which).clone()
        first[0], first[1] = first[0] - 1 if first[0] else first[0] + 1, first[1] + 1 if first[0] else first[1] - 1
        changed = type(people.clients[0])(**{**vars(people.clients[0]), which: first})
        return type(people)((changed, *people.clients[1:]), people.scheme, people.groups)

    monkeypatch.setattr(conftest, "population", traded)
    with pytest.raises(FileError, match="clients was"):
        simulate("fedit", rounds=[1, 0, 0], resume=True)


def test_other_pixels_or_labels_under_the_same_name_are_other_data(simulate: Simulate) -> None:
    train, test = squares(120, 1), squares(42, 2)
    simulate("fedit", rounds=[1, 0, 0], images=(train, test)).run()
    dark = ImageSet(train.images[:] // 2, train.labels, train.classes, train.name)
    turned = ImageSet(train.images, train.labels.roll(1), train.classes, train.name)
    for other in ((dark, test), (turned, test), (train, dark)):
        with pytest.raises(FileError, match="data was"):
            simulate("fedit", rounds=[1, 0, 0], images=other, resume=True)
