"""FedTreeLoRA: where the tree is cut in each block, and what a client has inside and outside of its group."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import own
from hilora.federated.strategies.fedtreelora import CERTAIN, Mixed
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, same
from tests.federated.engine.test_batched import IMAGES, SHARES, make, some_models, task, train
from tests.federated.strategies.by_hand import ALL, Halves, each

CUT = torch.tensor([[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 0, 0], [0, 1, 2]])


def apart(groups: list[int], near: float = 1.0, far: float = 10.0) -> Tensor:
    labels = torch.tensor(groups)
    distances = torch.where(labels[:, None] == labels, near, far)
    return distances * (1 - torch.eye(len(groups)))


def cuts(*distances: Tensor, **options: Any) -> list[list[int]]:
    found: Tensor = Halves("fedtreelora", **options).server.cuts(torch.stack(distances))
    labels: list[list[int]] = found.T.tolist()
    return labels


def test_groups_split_from_block_to_block_where_distances_say_so() -> None:
    alike, two, four = apart([0] * 8), apart([0] * 4 + [1] * 4), apart([0, 0, 1, 1, 2, 2, 3, 3], near=0.5)
    assert cuts(alike, two, four, window=4) == [[0] * 8, [0] * 4 + [1] * 4, [0, 0, 1, 1, 2, 2, 3, 3]]
    # Less than K groups more in one block: of 2 to 3 the silhouette takes three.
    assert [max(labels) + 1 for labels in cuts(alike, two, four, window=2)] == [1, 2, 3]


def test_groups_never_merge_again_nor_cross() -> None:
    """Blocks that would group otherwise by themselves take the tree's groups: no drift."""
    one, other = apart([0, 0, 0, 0, 1, 1, 1, 1], far=20.0), apart([0, 1, 0, 1, 0, 1, 0, 1])
    found = [torch.tensor(labels) for labels in cuts(one, other, apart([0] * 8), window=3)]
    assert found[0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    for fewer, more in pairwise(found):
        assert all(len(fewer[more == group].unique()) == 1 for group in more.unique())


def test_the_threshold_keeps_all_together() -> None:
    two = apart([0] * 4 + [1] * 4)
    assert cuts(two, two, tau_one=0.95) == [[0] * 8] * 2
    assert cuts(two, two, tau_one=0.5) == [[0] * 4 + [1] * 4] * 2


def grouped(weights: list[int] | None = None) -> Halves:
    """Halves after one round alone, of 7 on the mean, and with these groups."""
    halves = Halves("fedtreelora", weights, rounds=[2, 3, 0], tau_one=1.0)
    halves.begin()
    halves.round()
    halves.round()
    halves.begin(1)
    assert not halves.server.cut.any()
    halves.server.cut = CUT
    return halves


def test_each_block_is_averaged_inside_its_group_and_the_others_stand_outside() -> None:
    halves = grouped()
    each(halves.server.cluster.B[0], [7] * 8)
    halves.round()
    call = halves.calls[-1]
    assert call.tier == "cluster"
    inside = halves.models(ALL).tiers["cluster"].taken()
    outside = halves.server.configure(halves.stage, ALL).tiers["root"].taken()
    each(inside.B[0][:, 0], [10.5] * 8)
    each(inside.B[0][:, 1], [9, 9, 9, 12, 12, 12, 9, 12])
    each(inside.B[0][:, 2], [8.5, 8.5, 10, 12, 12, 12, 8.5, 12])
    each(outside.B[0][:, 0], [0] * 8)
    each(outside.B[0][:, 1], [12, 12, 12, 9, 9, 9, 12, 9])
    (first, third), rest = (46 / 4, (17 + 36) / 5), 27 / 3
    each(outside.B[0][:, 2], [first, first, third, rest, rest, rest, first, rest])
    assert outside.has[0].tolist() == [[False, True, True]] * 8
    (logits,) = call.models.composition.tensors().values()  # type: ignore[union-attr]
    assert logits.tolist() == [[CERTAIN, 0, 0]] * 6


def test_means_are_by_images_and_the_last_ones_of_absent_clients_count_outside() -> None:
    halves = grouped([30, 10, 10, 10, 10, 40, 10, 10])
    halves.server.cluster = halves.server.cluster.each(torch.zeros_like)
    halves.round()
    inside = halves.models(ALL).tiers["cluster"].taken().B[0]
    left, right = (30 * 1 + 10 * 2 + 10 * 3) / 50, (10 * 4 + 10 * 5 + 40 * 6) / 60
    each(inside[:, 1], [left] * 3 + [right] * 3 + [left, right])
    halves.round(torch.tensor([0, 1]))
    inside = halves.models(ALL).tiers["cluster"].taken().B[0]
    changed = left + (30 * 1 + 10 * 2) / 40
    each(inside[:, 1], [changed] * 3 + [right] * 3 + [changed, right])
    outside = halves.server.configure(halves.stage, ALL).tiers["root"].taken().B[0]
    each(outside[:, 1], [right] * 3 + [changed] * 3 + [right, changed])


def test_a_newcomer_takes_the_place_of_the_nearest() -> None:
    halves = grouped()
    halves.server.cut = halves.server.cut.clone()
    warm = halves.server.warm.B[0]
    warm[4] = 7.0  # as client 6 trains it from the start
    halves.admit()
    assert halves.calls[-1].how["epochs"] == 2
    assert halves.server.cut[6].tolist() == CUT[4].tolist()


@pytest.mark.parametrize("size", [4, 1])
def test_a_share_weighs_what_is_inside_and_the_rest_what_is_outside(
    backbone: Backbone, double: None, size: int
) -> None:
    backbone.model.double()
    torch.manual_seed(0)
    engine = make(backbone, clients_at_once=size)
    models = some_models(engine)
    models = replace(models, tiers={tier: models.tiers[tier] for tier in ("root", "cluster")})
    logits = [torch.randn(4, A.shape[1]) for A in models.tiers["root"].table.A]
    logits[0][:, 1] = CERTAIN
    tiers = {}
    for tier, rows in models.tiers.items():
        table, pairs = rows.taken(), []
        for B, logit in zip(table.B, logits, strict=True):
            share = torch.sigmoid(logit)[..., None, None]
            pairs.append(B * (share if tier == "cluster" else 1 - share))
        tiers[tier] = own(AdapterTable(table.A, pairs))
    mixed = replace(models, composition=Mixed(logits))
    a, b = (engine.evaluate(IMAGES, SHARES, one).loss for one in (mixed, replace(models, tiers=tiers)))
    torch.testing.assert_close(a, b, equal_nan=True)


def test_together_is_the_same_as_one_by_one_and_certain_shares_stay(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    torch.manual_seed(0)
    together, alone = (make(backbone, clients_at_once=size) for size in (4, 1))
    models = some_models(together)
    logits = [torch.zeros(4, A.shape[1]) for A in models.tiers["root"].table.A]
    logits[0][:, 0] = CERTAIN
    models = replace(models, composition=Mixed(logits))
    a, b = (train(engine, task("cluster", penalty=()), models) for engine in (together, alone))
    assert a.composition is not None
    assert b.composition is not None
    assert same(a.composition, b.composition, 1e-9)
    assert same(a.tiers["cluster"], b.tiers["cluster"], 1e-9)
    found = a.composition.tensors()["share.0"]
    assert (found[:, 0] == CERTAIN).all()
    assert (found[[0, 1, 3], 1:] != 0).all()


@pytest.mark.slow
def test_what_is_outside_of_nobody_is_not_sent(simulate: Simulate, tmp_path: Path) -> None:
    adapter = 2 * 4 * 4 * 2 * 24
    for tau, sent in ((1.0, 1), (-1.0, 2)):  # one group in all blocks, or always more
        simulation = simulate("fedtreelora", tau_one=tau, out=tmp_path / str(sent))
        moved = simulation.run()["communication"]["per_client"]
        assert moved["up"] == [(1 + 3) * adapter] * 5 + [adapter // 2]
        assert moved["down"] == [3 * sent * adapter] * 5 + [sent * adapter]
