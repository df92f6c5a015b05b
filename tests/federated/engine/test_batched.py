"""A batch of clients trains them as if each were alone."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch

import hilora
from benchmarks.timing import peak_bytes
from hilora.adapters.table import AdapterTable
from hilora.federated.client import Models, Trained
from hilora.federated.data.images import ImageSet
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.bench import LocalAlgorithm
from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.shared_pass import Task
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Head, Rows, own, shared
from hilora.federated.settings import TrainingSettings
from hilora.federated.streams import stream
from hilora.models.backbone import Backbone
from tests.federated.conftest import CLASSES, copied, same, squares

IMAGES = squares(60, 1)
SHARES = [torch.arange(0, 11), torch.arange(11, 12), torch.empty(0, dtype=torch.long), torch.arange(20, 29)]
IDS = torch.tensor([4, 2, 7, 5])
RANKS = {"root": 2, "cluster": 3, "leaf": 1}
PENALTY = (("root", 2.0), ("cluster", 3.0))


def make(backbone: Backbone, device: str = "cpu", **options: Any) -> BatchedEngine:
    settings = TrainingSettings(**{"batch_size": 4, "rank": RANKS, **options})
    config = hilora.HiLoRAConfig(r=settings.rank, lora_alpha=settings.lora_alpha, tiers=tuple(RANKS))
    return BatchedEngine(backbone, config, settings, torch.device(device), torch.get_default_dtype())


def some_models(engine: BatchedEngine) -> Models:
    """Four clients on one root, two clusters and leaves of their own, none of them zero."""
    tiers = {}
    for tier, slots, slot in (("root", 1, [0, 0, 0, 0]), ("cluster", 2, [1, 0, 1, 1]), ("leaf", 4, [0, 1, 2, 3])):
        table = engine.fresh(tier, slots, stream(3, "fresh adapters", slots))
        lively = AdapterTable(table.A, [torch.randn(B.shape) * 0.1 for B in table.B])
        tiers[tier] = Rows(lively, torch.tensor(slot))
    head = Head(torch.randn(1, CLASSES, 24) * 0.1, torch.zeros(1, CLASSES))
    return Models(tiers, shared(head, IDS))


def task(tier: str, epochs: int = 2, algorithm: LocalAlgorithm | None = None, **more: Any) -> Task:
    return Task(tier, algorithm or LocalSGD(), epochs, tier, **{"penalty": PENALTY, **more})


def train(
    engine: BatchedEngine, what: str | Task, models: Models, order: list[int] | None = None, parts: Parts | None = None
) -> Trained:
    order = order or [0, 1, 2, 3]
    what = task(what) if isinstance(what, str) else what
    shares = [SHARES[i] for i in order]
    return engine.train(IMAGES, shares, models.of(torch.tensor(order)), what, IDS[order], "training", 1, parts)


@pytest.mark.parametrize("tier", ["root", "cluster", "leaf"])
@pytest.mark.parametrize("augment", [False, True])
def test_together_is_the_same_as_one_by_one(backbone: Backbone, double: None, tier: str, augment: bool) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone = (make(backbone, clients_at_once=size, augment=augment) for size in (4, 1))
    models = some_models(together)
    a, b = train(together, tier, models), train(alone, tier, models)
    assert same(a.tiers[tier], b.tiers[tier], 1e-10)
    assert same(a.head, b.head, 1e-10)
    torch.testing.assert_close(a.loss, b.loss, equal_nan=True)
    start = models.tiers[tier].taken()
    moved = [not torch.equal(a.tiers[tier].B[0][i], start.B[0][i]) for i in range(4)]
    assert moved == [True, True, False, True]  # the third client has no images
    assert a.images.tolist() == [22, 2, 0, 18]
    assert a.loss.isnan().tolist() == [False, False, True, False]
    assert a.clients.tolist() == IDS.tolist()


def test_in_fp32_together_and_one_by_one_differ_by_rounding(backbone: Backbone) -> None:
    torch.manual_seed(0)
    together, alone = (make(backbone, clients_at_once=size) for size in (4, 1))
    models = some_models(together)
    a, b = (train(engine, "leaf", models).tiers["leaf"].tensors() for engine in (together, alone))
    for name, start in models.tiers["leaf"].taken().tensors().items():
        assert (a[name] - b[name]).double().norm() <= 1e-2 * (b[name] - start).double().norm()


def test_the_order_of_clients_does_not_matter(backbone: Backbone, double: None) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    engine = make(backbone, clients_at_once=2)
    models, order = some_models(engine), [2, 0, 3, 1]
    a, b = train(engine, "leaf", models), train(engine, "leaf", models, order)
    assert same(a.tiers["leaf"].rows(torch.tensor(order)), b.tiers["leaf"], 1e-10)


def test_training_changes_neither_its_start_nor_the_backbone(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)
    before = {tier: copied(rows.table) for tier, rows in models.tiers.items()}
    names = dict(backbone.model.named_parameters())
    train(engine, "root", models)
    assert all(same(models.tiers[tier].table, table) for tier, table in before.items())
    now = dict(engine.model.named_parameters())
    kept = [name for name in now if name in names]
    assert kept
    assert all(torch.equal(now[name], names[name]) for name in kept)


def test_orthogonality_pulls_the_trained_tier_away_from_frozen_ones(backbone: Backbone) -> None:
    def overlap(gamma: float) -> float:
        torch.manual_seed(0)
        engine = make(backbone, rank=2, lr=1e-2)
        models = some_models(engine)
        what = task("cluster", 10, penalty=(("root", gamma), ("cluster", gamma)))
        trained = engine.train(IMAGES, SHARES, models, what, IDS, "training", 1)
        return float((models.tiers["root"].taken().B[0].mT @ trained.tiers["cluster"].B[0]).square().sum())

    assert overlap(10.0) < overlap(0.0) / 4


def test_a_frozen_head_stays_as_it_is(backbone: Backbone) -> None:
    torch.manual_seed(0)
    engine = make(backbone)
    models = some_models(engine)
    start = models.head.taken()
    assert not same(train(engine, "cluster", models).head, start)
    assert same(train(engine, task("cluster", head=False), models).head, start)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_each_client_has_its_own_schedule_and_clipping(backbone: Backbone, double: None, schedule: str) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    together, alone, plain = (
        make(backbone, clients_at_once=size, schedule=kind, clip_norm=clip)
        for size, kind, clip in ((4, schedule, 1e-3), (1, schedule, 1e-3), (4, "constant", None))
    )
    models = some_models(together)
    a, b, c = (train(engine, "leaf", models) for engine in (together, alone, plain))
    assert same(a.tiers["leaf"], b.tiers["leaf"], 1e-10)
    assert same(a.head, b.head, 1e-10)
    assert not same(a.tiers["leaf"], c.tiers["leaf"], 1e-6)


def test_where_memory_runs_out_fewer_clients_go_on_with_the_same_result(
    backbone: Backbone, double: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    backbone.model.double()
    engine, small = make(backbone, clients_at_once=4), make(backbone, clients_at_once=1)
    models, whole = some_models(engine), BatchedEngine._train

    def hungry(self: BatchedEngine, images: ImageSet, shares: list[torch.Tensor], *more: Any) -> Any:
        if self is engine and len(shares) > 1:
            whole(self, images, shares, *more)  # what it drew from the random streams must not matter
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, images, shares, *more)

    monkeypatch.setattr(BatchedEngine, "_train", hungry)
    with caplog.at_level(logging.WARNING):
        a, b = train(engine, "cluster", models), train(small, "cluster", models)
    assert caplog.messages == [
        "out of memory with 4 clients at once, going on with 2",
        "out of memory with 2 clients at once, going on with 1",
    ]
    assert same(a.tiers["cluster"], b.tiers["cluster"], 1e-10)
    assert a.images.tolist() == b.images.tolist()


def test_other_errors_and_a_single_client_without_memory_are_errors(
    backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, error in ((4, RuntimeError("shapes")), (1, torch.OutOfMemoryError("CUDA out of memory"))):
        engine = make(backbone, clients_at_once=size)
        models = some_models(engine)

        def fails(*_: Any, error: RuntimeError = error) -> None:
            raise error

        monkeypatch.setattr(BatchedEngine, "_train", fails)
        with pytest.raises(type(error), match=str(error)):
            train(engine, "root", models)


def test_how_many_clients_at_once_follows_the_free_memory(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)

    def room(free: int) -> int:
        engine = make(backbone)
        monkeypatch.setattr("hilora.federated.engine.predictor.free_memory", lambda device: free)
        train(engine, "root", some_models(engine))
        assert engine.room is not None
        return engine.room

    assert room(10**12) == 160 // 4  # images at once over images of a batch
    middling = [room(free) for free in (200_000, 2_000_000, 20_000_000)]
    assert middling == sorted(middling)
    assert middling[0] == 1
    assert 1 < middling[1] < 40


def test_host_memory_is_in_proportion_to_the_adapters(backbone: Backbone) -> None:
    """Of many clients; a copy of what they start from and send back, and those that are trained at once besides."""
    count = 400
    engine = make(backbone, clients_at_once=5)
    images, models = squares(count, 1), some_models(engine)
    leaves, everyone = engine.fresh("leaf", count, stream(0, "many")), torch.arange(count)
    tiers = {tier: shared(models.tiers[tier].table, everyone) for tier in ("root", "cluster")}
    many = Models({**tiers, "leaf": own(leaves)}, shared(models.head.table, everyone))
    shares = list(everyone.view(-1, 1))

    def step() -> None:
        engine.train(images, shares, many, task("leaf", 1), everyone, "training")

    train(engine, "leaf", models)
    stacks = (*leaves.tensors().values(), *models.head.table.tensors().values())
    sent = sum(value[0].nbytes for value in stacks) * count
    assert peak_bytes(step, ()) < 1.2 * sent + 5 * 10**6


def test_the_next_training_leaves_the_results_of_the_last_alone(backbone: Backbone) -> None:
    """Memory is used again; what a strategy handed in, and what it got, is not that memory."""
    torch.manual_seed(0)
    engine = make(backbone)
    first, second = some_models(engine), some_models(engine)
    before, heads = {tier: copied(rows.table) for tier, rows in first.tiers.items()}, copied(first.head.table)
    a = train(engine, "leaf", first)
    kept, bench = copied(a.tiers["leaf"]), engine._ready
    train(engine, "leaf", second)
    assert engine._ready is bench is not None
    assert all(same(first.tiers[tier].table, table) for tier, table in before.items())
    assert same(first.head.table, heads)
    assert same(a.tiers["leaf"], kept)


def test_a_training_that_is_used_again_is_a_new_one(backbone: Backbone) -> None:
    """Whatever was trained before it: other tiers, epochs, penalties, values."""
    torch.manual_seed(0)
    used = make(backbone)
    models = some_models(used)
    for what in (task("leaf"), task("leaf", 1), task("cluster"), task("leaf", penalty=()), task("leaf", factors="B")):
        for start in (models, replace(some_models(used))):
            a, b = train(used, what, start), train(make(backbone), what, start)
            assert same(a.tiers[what.tier], b.tiers[what.tier])
            assert same(a.head, b.head)


def test_a_root_that_some_clients_lack_is_not_taken_for_shared_by_a_training_that_is_used_again(
    backbone: Backbone,
) -> None:
    torch.manual_seed(0)
    used = make(backbone)
    models = some_models(used)
    root = Rows(models.tiers["root"].table, torch.tensor([0, -1, 0, 0]))
    lacking = replace(models, tiers={**models.tiers, "root": root})
    train(used, "leaf", models)
    a, b = train(used, "leaf", lacking), train(make(backbone), "leaf", lacking)
    assert same(a.tiers["leaf"], b.tiers["leaf"])
    assert not same(a.tiers["leaf"], train(used, "leaf", models).tiers["leaf"])
