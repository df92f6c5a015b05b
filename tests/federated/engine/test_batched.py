"""A cohort trains its clients as if each were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.timing import peak_bytes
from hilora.federated.data.images import ImageSet
from hilora.federated.engine.batched import Cohort, Task
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.placement import placement
from hilora.federated.engine.state import Models, Table, Trained, stream
from hilora.federated.engine.training import LocalTraining
from hilora.federated.settings import RunConfig, per_tier
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, same, squares

IMAGES = squares(60, 1)
SHARES = [torch.arange(0, 11), torch.arange(11, 12), torch.empty(0, dtype=torch.long), torch.arange(20, 29)]
IDS = torch.tensor([4, 2, 7, 5])


def make(backbone: Backbone, **options: Any) -> Cohort:
    run = RunConfig(
        batch_size=4, rank={"root": 2, "cluster": 3, "leaf": 1}, gamma_root=2.0, gamma_cluster=3.0, **options
    )
    return Cohort(backbone, ("root", "cluster", "leaf"), run, torch.device("cpu"), torch.get_default_dtype())


def some_models(cohort: Cohort) -> Models:
    """Four clients on one root, two clusters and leaves of their own, none of them zero."""
    tiers = {}
    for tier, slots, slot in (("root", 1, [0, 0, 0, 0]), ("cluster", 2, [1, 0, 1, 1]), ("leaf", 4, [0, 1, 2, 3])):
        state = cohort.fresh(tier, slots, stream(3, "fresh adapters", slots))
        state = {name: value if name[0] == "A" else torch.randn(value.shape) * 0.1 for name, value in state.items()}
        tiers[tier] = Table(state, torch.tensor(slot))
    head = {"weight": torch.randn(1, CLASSES, 24) * 0.1, "bias": torch.zeros(1, CLASSES)}
    return Models(tiers, Table(head, torch.zeros(4, dtype=torch.long)))


def train(cohort: Cohort, tier: str, models: Models, order: list[int] | None = None) -> Trained:
    order = order or [0, 1, 2, 3]
    shares = [SHARES[i] for i in order]
    return cohort.train(IMAGES, shares, models.rows(torch.tensor(order)), Task(tier, 2), IDS[order], "training", 1)


@pytest.mark.parametrize("tier", ["root", "cluster", "leaf"])
@pytest.mark.parametrize("augment", [False, True])
def test_together_is_the_same_as_one_by_one(backbone: Backbone, double: None, tier: str, augment: bool) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, cohort_size=size, augment=augment) for size in (4, 1))
    models = some_models(together)
    a, b = train(together, tier, models), train(alone, tier, models)
    assert same(a.adapters, b.adapters, 1e-10)
    assert same(a.head, b.head, 1e-10)
    torch.testing.assert_close(a.loss, b.loss, equal_nan=True)
    start = models.tiers[tier].taken()
    moved = [not torch.equal(a.adapters["B0"][i], start["B0"][i]) for i in range(4)]
    assert moved == [True, True, False, True]  # the third client has no images
    assert a.images.tolist() == [22, 2, 0, 18]
    assert a.loss.isnan().tolist() == [False, False, True, False]


def test_in_fp32_together_and_one_by_one_differ_by_rounding(backbone: Backbone) -> None:
    torch.manual_seed(0)
    together, alone = (make(backbone, cohort_size=size) for size in (4, 1))
    models = some_models(together)
    a, b = train(together, "leaf", models), train(alone, "leaf", models)
    for name, start in models.tiers["leaf"].taken().items():
        update = b.adapters[name] - start
        assert (a.adapters[name] - b.adapters[name]).norm() <= 1e-2 * update.norm()


def test_the_order_of_clients_does_not_matter(backbone: Backbone, double: None) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    cohort = make(backbone, cohort_size=2)
    models, order = some_models(cohort), [2, 0, 3, 1]
    a, b = train(cohort, "leaf", models), train(cohort, "leaf", models, order)
    assert same(a.rows(torch.tensor(order)).adapters, b.adapters, 1e-10)


def test_training_changes_neither_its_start_nor_the_backbone(backbone: Backbone) -> None:
    torch.manual_seed(0)
    cohort = make(backbone)
    models = some_models(cohort)
    before = {tier: {k: v.clone() for k, v in table.state.items()} for tier, table in models.tiers.items()}
    weights = {name: value.clone() for name, value in cohort.model.named_parameters() if "lora_" not in name}
    train(cohort, "root", models)
    assert all(same(models.tiers[tier].state, before[tier]) for tier in before)
    assert all(torch.equal(value, dict(cohort.model.named_parameters())[name]) for name, value in weights.items())


def test_orthogonality_pulls_the_trained_tier_away_from_frozen_ones(backbone: Backbone) -> None:
    def overlap(gamma: float) -> float:
        torch.manual_seed(0)
        run = RunConfig(batch_size=4, rank=per_tier(2), gamma_root=gamma, gamma_cluster=gamma, lr=per_tier(1e-2))
        cohort = Cohort(backbone, ("root", "cluster", "leaf"), run, torch.device("cpu"), torch.float32)
        models = some_models(cohort)
        trained = cohort.train(IMAGES, SHARES, models, Task("cluster", 10), IDS, "training", 1)
        root = models.tiers["root"].taken()["B0"]
        return float((root.mT @ trained.adapters["B0"]).square().sum())

    assert overlap(10.0) < overlap(0.0) / 4


def test_a_global_head_is_trained_with_the_root_only(backbone: Backbone) -> None:
    torch.manual_seed(0)
    cohort = make(backbone, head="global")
    models = some_models(cohort)
    start = models.head.taken()
    assert not same(train(cohort, "root", models).head, start)
    assert same(train(cohort, "cluster", models).head, start)


def test_accuracy_of_each_client_on_its_own_images(backbone: Backbone) -> None:
    torch.manual_seed(0)
    cohort = make(backbone, cohort_size=3)
    models = some_models(cohort)
    together = cohort.evaluate(IMAGES, SHARES, models).correct
    assert together.isnan().tolist() == [False, False, True, False]
    for i in (0, 1, 3):
        alone = cohort.evaluate(IMAGES, [SHARES[i]], models.rows(torch.tensor([i]))).correct
        assert together[i] == alone[0]
    certain = {"weight": torch.zeros(1, CLASSES, 24), "bias": torch.eye(CLASSES)[2:3]}
    always_two = models._replace(head=Table(certain, torch.zeros(4, dtype=torch.long)))
    expected = (IMAGES.labels[SHARES[0]] == 2).double().mean()
    assert cohort.evaluate(IMAGES, SHARES, always_two).correct[0] == pytest.approx(float(expected))


def test_without_an_adapter_of_a_tier_a_client_predicts_with_the_others(backbone: Backbone) -> None:
    torch.manual_seed(0)
    cohort = make(backbone)
    models = some_models(cohort)
    zero = {name: value * (name[0] == "A") for name, value in models.tiers["leaf"].state.items()}
    silent = models._replace(tiers={**models.tiers, "leaf": Table(zero, models.tiers["leaf"].slot)})
    absent = models._replace(tiers={tier: models.tiers[tier] for tier in ("root", "cluster")})
    none = models._replace(tiers={**models.tiers, "leaf": models.tiers["leaf"]._replace(slot=torch.full((4,), -1))})
    expected = cohort.evaluate(IMAGES, SHARES, silent).correct
    for same_thing in (absent, none):
        torch.testing.assert_close(cohort.evaluate(IMAGES, SHARES, same_thing).correct, expected, equal_nan=True)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_each_client_has_its_own_schedule_and_clipping(backbone: Backbone, double: None, schedule: str) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone, plain = (
        make(backbone, cohort_size=size, schedule=kind, clip_norm=clip)
        for size, kind, clip in ((4, schedule, 1e-3), (1, schedule, 1e-3), (4, "constant", None))
    )
    models = some_models(together)
    a, b, c = (train(cohort, "leaf", models) for cohort in (together, alone, plain))
    assert same(a.adapters, b.adapters, 1e-10)
    assert same(a.head, b.head, 1e-10)
    assert not same(a.adapters, c.adapters, 1e-6)


@pytest.mark.parametrize(
    ("schedule", "rates"), [("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.8536, 0.5, 0.1464])]
)
def test_schedules(schedule: str, rates: list[float]) -> None:
    weight = torch.zeros(1, 1, requires_grad=True)
    training = LocalTraining(
        lambda pixels: weight.expand(1, 1, 2) * pixels[..., 0, 0, :2],
        lambda: torch.zeros(1),
        [Slotted(weight, 0, 1.0)],
        torch.zeros(1, 1, 3, 2, 2, dtype=torch.uint8),
        weight_decay=0.0,
        clip_norm=None,
        schedule=schedule,
    )
    for _ in range(2):  # the second time as the first
        training.begin(torch.tensor([4]))
        found = []
        for _ in range(4):
            found.append(float(training._rate()))  # type: ignore[arg-type]
            training.step(torch.ones(1, 1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.long))
        assert found == pytest.approx(rates, abs=1e-4)


def test_where_memory_runs_out_fewer_clients_go_on_with_the_same_result(
    backbone: Backbone, double: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    cohort, small = make(backbone, cohort_size=4), make(backbone, cohort_size=1)
    models, whole = some_models(cohort), Cohort._train
    notes: list[str] = []

    def hungry(self: Cohort, images: ImageSet, shares: list[torch.Tensor], *more: Any) -> Any:
        if self is cohort and len(shares) > 1:
            whole(self, images, shares, *more)  # what it drew from the random streams must not matter
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images, shares, *more)

    monkeypatch.setattr(Cohort, "_train", hungry)
    cohort.note = notes.append
    a, b = train(cohort, "cluster", models), train(small, "cluster", models)
    assert notes == [
        "out of memory with 4 clients at once, going on with 2",
        "out of memory with 2 clients at once, going on with 1",
    ]
    assert same(a.adapters, b.adapters, 1e-10)
    assert a.images.tolist() == b.images.tolist()


def test_other_errors_and_a_single_client_without_memory_are_errors(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    for cohort_size, error in ((4, RuntimeError("shapes")), (1, torch.OutOfMemoryError("CUDA out of memory"))):
        cohort = make(backbone, cohort_size=cohort_size)
        models = some_models(cohort)

        def fails(*_: Any, error: RuntimeError = error) -> None:
            raise error

        monkeypatch.setattr(Cohort, "_train", fails)
        with pytest.raises(type(error), match=str(error)):
            train(cohort, "root", models)


def test_the_size_of_cohorts_follows_the_free_memory(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def room(free: int) -> int:
        cohort = make(backbone)
        monkeypatch.setattr("hilora.federated.engine.predictor.free_memory", lambda device: free)
        train(cohort, "root", some_models(cohort))
        assert cohort.room is not None
        return cohort.room

    assert room(10**12) == 160 // 4  # images at once over images of a batch
    middling = [room(free) for free in (200_000, 2_000_000, 20_000_000)]
    assert middling == sorted(middling)
    assert middling[0] == 1
    assert 1 < middling[1] < 40


def test_host_memory_is_in_proportion_to_the_adapters(backbone: Backbone) -> None:
    """Of many clients; a copy of what they start from and send back, and one cohort besides."""
    count = 400
    cohort = make(backbone, cohort_size=5)
    images = squares(count, 1)
    models = some_models(cohort)
    leaves = cohort.fresh("leaf", count, stream(0, "many"))
    nowhere = torch.zeros(count, dtype=torch.long)
    many = Models(
        {
            **{tier: Table(models.tiers[tier].state, nowhere) for tier in ("root", "cluster")},
            "leaf": Table(leaves, torch.arange(count)),
        },
        Table(models.head.state, nowhere),
    )
    shares = list(torch.arange(count).view(-1, 1))

    def step() -> None:
        cohort.train(images, shares, many, Task("leaf"), torch.arange(count), "training")

    train(cohort, "leaf", models)
    sent = sum(value[0].nbytes for value in (*leaves.values(), *models.head.state.values())) * count
    assert peak_bytes(step, ()) < 1.2 * sent + 5 * 10**6


def test_the_next_training_leaves_the_tables_of_the_last_alone(backbone: Backbone) -> None:
    """The memory of a cohort is used again; what a strategy handed in is not that memory."""
    torch.manual_seed(0)
    cohort = make(backbone)
    first, second = some_models(cohort), some_models(cohort)
    before = {tier: {name: value.clone() for name, value in table.state.items()} for tier, table in first.tiers.items()}
    heads = {name: value.clone() for name, value in first.head.state.items()}
    a = train(cohort, "leaf", first)
    kept = {name: value.clone() for name, value in a.adapters.items()}
    train(cohort, "leaf", second)
    assert cohort._ready is not None
    assert all(same(first.tiers[tier].state, before[tier]) for tier in before)
    assert same(first.head.state, heads)
    assert same(a.adapters, kept)


def test_of_long_tables_only_the_rows_of_a_cohort_are_moved(backbone: Backbone) -> None:
    torch.manual_seed(0)
    cohort = make(backbone, cohort_size=2)
    models = some_models(cohort)
    absent = models._replace(
        tiers={**models.tiers, "leaf": models.tiers["leaf"]._replace(slot=torch.tensor([3, -1, 0, 1]))}
    )
    (values,) = placement(cohort.banks, absent.rows(torch.tensor([1, 3])))["leaf"]
    A, slot = values.A, values.slot
    assert A.shape[1] == 2
    assert slot is not None
    assert slot.tolist() == [-1, 1]
    assert torch.equal(A[:, 1], models.tiers["leaf"].state["A0"][1])
