"""Whole runs: what they leave, that they repeat, whom they train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import hilora
from hilora.adapters.io.files import read_tensors
from hilora.errors import HiLoRAError, InvalidValueError
from hilora.federated.strategies import STRATEGIES
from hilora.federated.strategies.fedit import FedIT
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, records, same, squares

pytestmark = pytest.mark.slow

FILES = {"summary.json", "metrics.jsonl", "adapters.safetensors", "heads.safetensors", "report.html"}
FILES |= {"accuracy.png", "clusters.png", "classes.png"}


def figures(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary without its timings."""
    timed = ("seconds", "seconds_by_phase", "images_per_second")
    return {key: value for key, value in summary.items() if key not in (*timed, "config")}


UNEQUAL = ("hetlora", "fslora", "fed-hello", "fedra")
TIERS = {
    "hilora": ["root", "cluster", "leaf"],
    "head-only": ["root", "cluster", "leaf"],
    "fdlora": ["root", "leaf"],
    "feddpa-f": ["root", "leaf"],
    **{name: ["root"] for name in ("fedit", "flexlora", "ffa-lora", "ifca", "central", *UNEQUAL)},
    **{name: ["root"] for name in ("lora-fair", "rolora", "sdflora", "fedopal")},
    **{name: ["cluster"] for name in ("fedlease", "fedtreelora")},
    "flora": ["leaf"],
    **{name: ["leaf"] for name in ("local-lora", "fedsa-lora", "feddpa-t", "pf2lora", "fedalt")},
}


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_run_leaves_everything_the_contract_names(simulate: Simulate, tmp_path: Path, strategy: str) -> None:
    summary = simulate(strategy).run()
    out, tiers = tmp_path / "out", TIERS[strategy]
    assert {path.name for path in out.iterdir()} >= FILES
    written = json.loads((out / "summary.json").read_text())
    assert {key: written[key] for key in summary} == summary
    assert list(summary["tiers"]) == tiers
    assert summary["final"] == summary["tiers"][tiers[-1]]
    assert all(0 <= summary["final"][key] <= 1 for key in ("mean", "tail"))
    assert (summary["strategy"], summary["data"], summary["backbone"]) == (strategy, "squares", "tiny")
    assert summary["seed"] == 0
    assert summary["interrupted"] is False
    alone = strategy in (
        "local-lora",
        "fedsa-lora",
        "pf2lora",
        "fedalt",
        "sdflora",
        "fedopal",
        "fedlease",
        "fedtreelora",
    )
    assert (summary["unseen"]["zero_leaf"] is None) == alone
    assert 0 <= summary["unseen"]["leaf"] <= 1
    assert (summary["clusters"] is None) == (strategy not in ("hilora", "head-only", "ifca", "fedlease"))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [record["round"] for record in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["test"] == summary["final"]
    assert lines[-1]["val"] == summary["val"]
    assert sum(record["images"] for record in lines) == summary["images"]


def test_what_a_run_says_of_each_client_and_of_its_cost(simulate: Simulate) -> None:
    summary = simulate(arguments={"asked": "so"}).run()
    each = summary["per_client"]
    assert each["ids"] == [0, 1, 2, 3, 4]
    assert each["unseen_ids"] == [5]
    assert sum(each["test"]) / 5 == pytest.approx(summary["final"]["mean"])
    assert each["unseen_leaf"] == [pytest.approx(summary["unseen"]["leaf"])]
    adapter, head = 2 * (2 * 2 * 2 * 24), 6 * 24 + 6  # q and v of two blocks at rank 2, A and B
    assert summary["trained_parameters"] == adapter + head
    assert list(summary["diagnostics"]) == ["root", "cluster", "leaf"]
    assert set(summary["diagnostics"]["leaf"]["overlap"]) == {"root", "cluster"}
    assert summary["arguments"] == {"asked": "so"}
    assert summary["config"]["gamma_root"] == 0.1
    assert summary["config"]["rank"] == {"root": 2, "cluster": 2, "leaf": 2}


def test_rounds_without_an_evaluation_change_nothing_else(simulate: Simulate, tmp_path: Path) -> None:
    often, seldom = simulate(), simulate(out=tmp_path / "seldom", evaluate_every=0)
    a, b = often.run(), seldom.run()
    assert a["tiers"] == b["tiers"]
    measured = [record["test"]["mean"] is not None for record in records(seldom)]
    assert measured == [False, False, True, False, True, True]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_the_same_seed_gives_the_same_numbers(simulate: Simulate, tmp_path: Path, strategy: str) -> None:
    first, second, other = (
        simulate(strategy, out=tmp_path / str(i), seed=seed, augment=True, rounds=[2, 1, 1])
        for i, seed in enumerate((1, 1, 2))
    )
    a, b, c = (figures(simulation.run()) for simulation in (first, second, other))
    assert a == b
    everyone = torch.arange(6)
    one, same_one = (run.models(everyone) for run in (first, second))
    assert all(same(one.tiers[tier].taken(), same_one.tiers[tier].taken()) for tier in one.tiers)
    assert [r["loss"] for r in records(first)] != [r["loss"] for r in records(other)]
    assert a["seed"] != c["seed"]


@pytest.mark.parametrize("strategy", list(STRATEGIES))
@pytest.mark.parametrize("size", [4, None])
def test_how_many_clients_are_trained_at_once_changes_only_rounding(
    simulate: Simulate, backbone: Backbone, double: None, tmp_path: Path, strategy: str, size: int | None
) -> None:
    """Six clients of unequal sizes, a whole run in fp64: one by one, and by four or all at once."""
    backbone.model.double()
    alone, together = (
        simulate(strategy, out=tmp_path / str(n), clients_at_once=n, augment=True, rounds=[2, 1, 1]) for n in (1, size)
    )
    a, b = alone.run(), together.run()
    assert together.engine.room == (4 if size else 40)
    for one_by_one, at_once in zip(records(alone), records(together), strict=True):
        if one_by_one["loss"] is not None:  # a round that only fuses has none
            assert one_by_one["loss"] == pytest.approx(at_once["loss"], rel=1e-9)
        assert one_by_one["test"] == at_once["test"]
    everyone = torch.arange(6)
    one, other = (run.models(everyone) for run in (alone, together))
    for tier, rows in one.tiers.items():
        found = other.tiers[tier].taken().tensors()
        for name, value in rows.taken().tensors().items():
            assert (value - found[name]).double().norm() <= 1e-9 * value.double().norm()
    assert same(one.head.taken(), other.head.taken(), 1e-9)
    assert a["unseen"] == b["unseen"]
    assert a["communication"] == b["communication"]


def test_saved_adapters_and_heads_predict_as_the_run_did(
    simulate: Simulate, backbone: Backbone, tmp_path: Path
) -> None:
    simulation = simulate()
    simulation.run()
    model = hilora.load_adapters(backbone.model, tmp_path / "out" / "adapters.safetensors")
    heads, _ = read_tensors(tmp_path / "out" / "heads.safetensors")
    client, found = 3, simulation.server.clustering()
    assert found is not None
    hilora.set_slots(model, root=torch.tensor([0]), cluster=found.labels[client][None], leaf=torch.tensor([client]))
    test = squares(42, 2)
    own = simulation.population.clients[client].test
    with torch.no_grad():
        features = model.eval()((test.images[own] / 255 - 0.5) / 0.25)
    guesses = (features @ heads["leaf.weight"][client].T + heads["leaf.bias"][client]).argmax(1)
    right = simulation.engine.evaluate(test, [own], simulation.models(torch.tensor([client]))).correct
    assert float((guesses == test.labels[own]).float().mean()) == pytest.approx(float(right))


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_clients_without_images_are_no_trouble(simulate: Simulate, strategy: str) -> None:
    """Two that are seen have none, others one or a few, and of the unseen ones one has none."""
    summary = simulate(strategy, sizes=[0, 1, 12, 9, 0, 1, 0], unseen=2, rounds=[1, 1, 1]).run()
    assert summary["final"]["mean"] is not None
    assert summary["unseen"]["leaf"] is not None
    if summary["clusters"] is not None:
        assert len(summary["clusters"]["labels"]) == 5
        assert len(summary["clusters"]["unseen"]) == 2


def test_nobody_with_images_is_an_error_before_anything_is_written(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="no seen client has an image to train on"):
        simulate(sizes=[0, 0, 5], unseen=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_a_share_of_the_clients_may_train(simulate: Simulate, strategy: str) -> None:
    simulation = simulate(strategy, participation=0.25, rounds=[2, 1, 1])
    summary = simulation.run()
    counts = [record["clients"] for record in records(simulation)]
    alone = {"hilora": [1, 1, 1, 5], "head-only": [1, 1, 1, 5], "feddpa-f": [1, 1, 1, 5], "fdlora": [5, 5, 1, 5]}
    alone |= {"local-lora": [5] * 4, "central": [5] * 4}
    alone |= {name: [5, 5, 1, 1] for name in ("fedlease", "fedtreelora")}  # in the warm-up all train
    assert counts == alone.get(strategy, [1] * 4)
    if strategy == "hilora":  # most clients never trained the root: they joined by probing
        assert min(summary["clusters"]["labels"]) == 0
        assert len(summary["clusters"]["labels"]) == 5


def test_stages_may_have_no_rounds(simulate: Simulate, tmp_path: Path) -> None:
    assert list(simulate(rounds=[0, 1, 1]).run()["tiers"]) == ["cluster", "leaf"]
    assert list(simulate(rounds=[1, 0, 0], out=tmp_path / "root").run()["tiers"]) == ["root"]


def test_published_forms_run(simulate: Simulate) -> None:
    assert simulate(published=True, rounds=[2, 1, 1]).run()["clusters"]["k"] >= 2


def test_no_unseen_clients_and_unseen_clients_that_train_nothing(simulate: Simulate, tmp_path: Path) -> None:
    assert simulate(unseen=0, rounds=[1, 1, 1]).run()["unseen"] == {"zero_leaf": None, "leaf": None}
    found = simulate(unseen_epochs=0, rounds=[1, 1, 1], out=tmp_path / "none").run()["unseen"]
    assert found["zero_leaf"] is not None
    assert found["leaf"] is None


def test_an_update_that_is_not_finite_ends_the_run_with_a_clear_error(simulate: Simulate, tmp_path: Path) -> None:
    with pytest.raises(HiLoRAError, match="not finite"):
        simulate(lr=1e30).run()
    assert (tmp_path / "out" / "summary.json").exists()


def test_the_root_stops_when_it_hardly_changes(simulate: Simulate) -> None:
    simulation = simulate(tau_rel=1e9, rounds=[3, 1, 1])
    simulation.run()
    assert [record["stage"] for record in records(simulation)] == ["root", "root", "cluster", "leaf"]
    assert all("stop" not in record for record in records(simulation))


def test_a_strategy_is_a_name_a_class_or_an_object_with_settings(simulate: Simulate, tmp_path: Path) -> None:
    """And they are the same but for the settings."""
    from hilora.federated.simulation import Simulation

    def losses(strategy: Any, out: str) -> list[float]:
        model = simulate("fedit", out=tmp_path / f"{out}-template", rounds=[1, 1, 0])
        images = model.train_images, model.test_images, model.population
        simulation = Simulation(strategy, model.settings, model.backbone, *images, tmp_path / out, torch.device("cpu"))
        simulation.run()
        return [record["loss"] for record in records(simulation)]

    by_name = losses("fedit", "name")
    assert losses(FedIT, "class") == losses(FedIT(), "object") == by_name
    with pytest.raises(InvalidValueError, match="unknown strategy 'fedid': there are "):
        losses("fedid", "unknown")
    with pytest.raises(InvalidValueError, match="there is no setting 'magic'"):
        FedIT(magic=1)
