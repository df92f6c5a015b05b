"""Whole runs: what they leave, that they repeat, that they can be stopped and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hilora
from hilora.federated.callbacks.checkpoint import save_checkpoint
from hilora.federated.callbacks.results import set_aside
from hilora.federated.simulation import Simulation
from hilora.federated.strategies import STRATEGIES
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, same, squares

FILES = {"summary.json", "metrics.jsonl", "accuracy.png", "clusters.png", "classes.png", "adapters.safetensors"}


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without its timings."""
    return {key: value for key, value in summary.items() if key not in ("seconds", "images_per_second", "config")}


TIERS = {
    "hilora": ["root", "cluster", "leaf"],
    "head-only": ["root", "cluster", "leaf"],
    "fdlora": ["root", "leaf"],
    "feddpa-f": ["root", "leaf"],
    **{name: ["root"] for name in ("fedit", "flexlora", "ffa-lora", "ifca", "central")},
    **{name: ["leaf"] for name in ("local-lora", "fedsa-lora", "feddpa-t", "pf2lora", "fedalt")},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run_leaves_everything_the_contract_names(simulate: Simulate, tmp_path: Path, strategy: str) -> None:
    summary = simulate(strategy).run()
    out, tiers = tmp_path / "out", TIERS[strategy]
    assert {path.name for path in out.iterdir()} >= FILES
    assert json.loads((out / "summary.json").read_text()) == summary
    assert list(summary["tiers"]) == tiers
    assert summary["final"] == summary["tiers"][tiers[-1]]
    assert all(0 <= summary["final"][key] <= 1 for key in ("mean", "tail"))
    assert (summary["strategy"], summary["data"], summary["backbone"]) == (strategy, "squares", "tiny")
    assert summary["seed"] == 0
    assert summary["interrupted"] is False
    alone = strategy in ("local-lora", "fedsa-lora", "pf2lora", "fedalt")
    assert (summary["unseen"]["zero_leaf"] is None) == alone
    assert 0 <= summary["unseen"]["leaf"] <= 1
    assert (summary["clusters"] is None) == (strategy not in ("hilora", "head-only", "ifca"))
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["test"] == summary["final"]
    assert records[-1]["val"] == summary["val"]
    assert sum(record["images"] for record in records) == summary["images"]


def test_what_a_run_says_of_each_client_and_of_its_cost(simulate: Simulate) -> None:
    simulation = simulate()
    summary = simulation.run()
    each = summary["per_client"]
    assert each["ids"] == [0, 1, 2, 3, 4]
    assert each["unseen_ids"] == [5]
    assert sum(each["test"]) / 5 == pytest.approx(summary["final"]["mean"])
    assert each["unseen_leaf"] == [pytest.approx(summary["unseen"]["leaf"])]
    adapter, head = 2 * (2 * 2 * 2 * 24), 6 * 24 + 6  # q and v of two blocks at rank 2, A and B
    assert summary["trained_parameters"] == adapter + head
    up = 4 * (adapter + head) * 5 / 6  # four bytes; of six rounds, that of the leaf sends nothing
    assert summary["communication"] == {"up": pytest.approx(up), "down": pytest.approx(up)}
    assert list(summary["diagnostics"]) == ["root", "cluster", "leaf"]
    assert set(summary["diagnostics"]["leaf"]["overlap"]) == {"root", "cluster"}


def test_rounds_without_an_evaluation_change_nothing_else(simulate: Simulate, tmp_path: Path) -> None:
    often, seldom = simulate(), simulate(out=tmp_path / "seldom", evaluate_every=0)
    a, b = often.run(), seldom.run()
    assert a["tiers"] == b["tiers"]
    measured = [record["test"]["mean"] is not None for record in seldom.log.records]
    assert measured == [False, False, True, False, True, True]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_same_seed_gives_the_same_numbers(simulate: Simulate, tmp_path: Path, strategy: str) -> None:
    first, second, other = (
        simulate(strategy, out=tmp_path / str(i), seed=seed, augment=True) for i, seed in enumerate((1, 1, 2))
    )
    a, b, c = (figures(simulation.run()) for simulation in (first, second, other))
    assert a == b
    for one, same_one in zip(*(run.strategy.tables()[0].values() for run in (first, second)), strict=True):
        assert same(one, same_one)
    assert [r["loss"] for r in first.log.records] != [r["loss"] for r in other.log.records]
    assert a["seed"] != c["seed"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("size", [4, None])
def test_the_cut_into_cohorts_changes_only_rounding(
    simulate: Simulate, backbone: Backbone, double: None, tmp_path: Path, strategy: str, size: int | None
) -> None:
    """Six clients of unequal sizes, a whole run in fp64: one by one, and by four or all at once."""
    backbone.model.double()
    alone, together = (simulate(strategy, out=tmp_path / str(n), cohort_size=n, augment=True) for n in (1, size))
    alone.run(), together.run()
    assert together.cohort.room == (4 if size else 40)
    for one_by_one, at_once in zip(alone.log.records, together.log.records, strict=True):
        if one_by_one["loss"] is not None:  # a round that only fuses has none
            assert one_by_one["loss"] == pytest.approx(at_once["loss"], rel=1e-9)
        assert one_by_one["test"] == at_once["test"]
    everyone = torch.arange(6)
    one, other = (run.strategy.models(everyone) for run in (alone, together))
    for tier, table in one.tiers.items():
        for name, a in table.taken().items():
            assert (a - other.tiers[tier].taken()[name]).norm() <= 1e-9 * a.norm()
    assert same(one.head.taken(), other.head.taken(), 1e-9)
    assert alone.unseen == together.unseen


class Stop(KeyboardInterrupt):
    pass


def stop_after(simulation: Simulation, rounds: int) -> None:
    """Press Ctrl-C in the training of the round after `rounds`."""
    train = simulation.cohort.train

    def interrupted(*args: Any) -> Any:
        if simulation.round == rounds:
            raise Stop
        return train(*args)

    simulation.cohort.train = interrupted  # type: ignore[method-assign, assignment]


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
    strip = [{k: v for k, v in record.items() if k != "seconds"} for record in resumed.log.records]
    assert strip == [{k: v for k, v in record.items() if k != "seconds"} for record in whole.log.records]


def test_what_ended_a_run_is_raised_even_where_its_checkpoint_is_gone(simulate: Simulate, tmp_path: Path) -> None:
    stopped = simulate()
    stop_after(stopped, 1)
    train = stopped.cohort.train

    def lost(*args: Any) -> Any:
        (tmp_path / "out" / "checkpoint.pt").unlink(missing_ok=True)
        return train(*args)

    stopped.cohort.train = lost  # type: ignore[method-assign, assignment]
    with pytest.raises(Stop) as ended:
        stopped.run()
    assert "could not be written: there is no checkpoint" in ended.value.__notes__[0]


def test_a_full_disk_is_named_where_a_checkpoint_is_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path / "checkpoint.pt", {"values": torch.zeros(9)})
    assert list(tmp_path.iterdir()) == []


def test_resuming_a_finished_run_changes_nothing(simulate: Simulate) -> None:
    first = figures(simulate().run())
    assert figures(simulate(resume=True).run()) == first


def test_resuming_another_run_is_refused(simulate: Simulate, tmp_path: Path) -> None:
    simulate().run()
    with pytest.raises(ValueError, match="differs in batch_size"):
        simulate(batch_size=3, resume=True)
    with pytest.raises(ValueError, match="strategy"):
        simulate("fedit", resume=True)
    with pytest.raises(FileNotFoundError, match="without --resume"):
        simulate(out=tmp_path / "nowhere", resume=True)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        simulate(resume=True)


def test_saved_adapters_and_heads_predict_as_the_run_did(
    simulate: Simulate, backbone: Backbone, tmp_path: Path
) -> None:
    from hilora.adapters.io.native import read_tensors

    simulation = simulate()
    simulation.run()
    model = hilora.load_adapters(backbone.model, tmp_path / "out" / "adapters.safetensors")
    heads, _ = read_tensors(tmp_path / "out" / "heads.safetensors")
    client = 3
    assert simulation.strategy.clustering() is not None
    cluster = simulation.strategy.clustering().labels[client]  # type: ignore[union-attr]
    hilora.set_slots(model, root=torch.tensor([0]), cluster=cluster[None], leaf=torch.tensor([client]))
    test = squares(42, 2)
    own = simulation.population.clients[client].test
    with torch.no_grad():
        features = model.eval()((test.images[own] / 255 - 0.5) / 0.25)
    guesses = (features @ heads["leaf.weight"][client].T + heads["leaf.bias"][client]).argmax(1)
    right = simulation.cohort.evaluate(test, [own], simulation.strategy.models(torch.tensor([client]))).correct
    assert float((guesses == test.labels[own]).float().mean()) == pytest.approx(float(right))


def test_clients_without_images_are_no_trouble(simulate: Simulate) -> None:
    summary = simulate(sizes=[0, 1, 12, 9, 0, 1, 0], unseen=2).run()
    assert summary["final"]["mean"] is not None
    assert len(summary["clusters"]["labels"]) == 5


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_share_of_the_clients_may_train(simulate: Simulate, strategy: str) -> None:
    simulation = simulate(strategy, participation=0.25, rounds=[2, 1, 1])
    summary = simulation.run()
    counts = [record["clients"] for record in simulation.log.records]
    alone = {"hilora": [1, 1, 1, 5], "head-only": [1, 1, 1, 5], "feddpa-f": [1, 1, 1, 5], "fdlora": [5, 5, 1, 5]}
    alone |= {"local-lora": [5] * 4, "central": [5] * 4}
    assert counts == alone.get(strategy, [1] * 4)
    if strategy == "hilora":  # most clients never trained the root: they joined by probing
        assert min(summary["clusters"]["labels"]) == 0
        assert len(summary["clusters"]["labels"]) == 5


def test_stages_may_have_no_rounds(simulate: Simulate, tmp_path: Path) -> None:
    assert list(simulate(rounds=[0, 1, 1]).run()["tiers"]) == ["cluster", "leaf"]
    assert list(simulate(rounds=[1, 0, 0], out=tmp_path / "root").run()["tiers"]) == ["root"]


def test_published_forms_run(simulate: Simulate) -> None:
    summary = simulate(published=True, rounds=[2, 1, 1]).run()
    assert summary["clusters"]["k"] >= 2


def test_no_unseen_clients(simulate: Simulate) -> None:
    assert simulate(unseen=0).run()["unseen"] == {"zero_leaf": None, "leaf": None}


def test_an_update_that_is_not_finite_ends_the_run_with_a_clear_error(simulate: Simulate, tmp_path: Path) -> None:
    simulation = simulate(lr=1e30)
    with pytest.raises(ValueError, match="not finite"):
        simulation.run()
    assert (tmp_path / "out" / "summary.json").exists()


def test_the_root_stops_when_it_hardly_changes(simulate: Simulate) -> None:
    simulation = simulate(tau_rel=1e9, rounds=[3, 1, 1])
    simulation.run()
    assert [record["stage"] for record in simulation.log.records] == ["root", "root", "cluster", "leaf"]


def test_earlier_results_are_set_aside(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (tmp_path / "summary.json").write_text(text)
        (tmp_path / "notes.txt").write_text("mine")
        set_aside(tmp_path)
    assert (tmp_path / "earlier-1" / "summary.json").read_text() == "first"
    assert (tmp_path / "earlier-2" / "summary.json").read_text() == "second"
    assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / "summary.json").exists()
