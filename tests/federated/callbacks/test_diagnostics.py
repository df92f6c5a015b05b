"""The theorem's terms on cases that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.callbacks.diagnostics import diagnose, label_distance, overlaps
from hilora.federated.client import Models
from hilora.federated.protocol import Head, shared

HEAD = Head(torch.zeros(1, 2, 3), torch.zeros(1, 2))


def models(clients: int = 2, **Bs: torch.Tensor) -> Models:
    """Of clients who share adapters of one projection with these B `[out, r]`."""
    everyone = torch.arange(clients)
    tables = {tier: AdapterTable([torch.ones(1, 1, B.shape[1], 4)], [B[None, None]]) for tier, B in Bs.items()}
    return Models({tier: shared(table, everyone) for tier, table in tables.items()}, shared(HEAD, everyone))


def test_overlap_is_one_inside_and_zero_across() -> None:
    eye = torch.eye(6)
    root, turned, across = eye[:, :2], 3 * eye[:, :2] @ torch.tensor([[1.0, 1], [1, -1]]), eye[:, 2:4]
    assert overlaps(models(root=root, cluster=turned)) == {"root": pytest.approx(1, abs=1e-6)}
    assert overlaps(models(root=root, cluster=across)) == {"root": pytest.approx(0, abs=1e-6)}
    half = torch.stack([eye[:, 0], eye[:, 5]], 1)
    found = overlaps(models(root=root, cluster=across, leaf=half))
    assert found == {"root": pytest.approx(0.5, abs=1e-6), "cluster": pytest.approx(0, abs=1e-6)}


def test_ranks_are_those_that_are_used_and_not_the_room_for_them() -> None:
    eye = torch.eye(6)
    one, three = eye[:, :1] @ torch.eye(1, 4), eye[:, :3] @ torch.eye(3, 4)
    assert overlaps(models(root=one, leaf=one)) == {"root": pytest.approx(1, abs=1e-6)}
    assert overlaps(models(root=one, leaf=three)) == {"root": pytest.approx(1, abs=1e-6)}
    assert overlaps(models(root=eye[:, 2:6], leaf=three)) == {"root": pytest.approx(1 / 3, abs=1e-6)}


def test_a_tier_that_is_zero_overlaps_with_nothing() -> None:
    assert overlaps(models(root=torch.zeros(6, 2), cluster=torch.eye(6)[:, :2])) == {}


def test_label_distance_is_the_total_variation_to_the_group() -> None:
    counts = torch.tensor([[4, 0], [0, 4], [2, 2], [0, 0]])
    together = torch.tensor([0, 0, 0, 0])
    assert label_distance(counts, together) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert label_distance(counts, torch.tensor([0, 1, 2, 3])) == 0
    assert label_distance(counts, torch.tensor([0, 1, 0, 1])) == pytest.approx((0.25 + 0.25 + 0) / 3)


def test_diagnosis_leaves_out_clients_without_images() -> None:
    loss = torch.tensor([1.0, torch.nan, 2.0])
    found = diagnose(loss, models(3, root=torch.ones(6, 1)), torch.ones(3, 2), None)
    assert found == {"train_loss": 1.5, "overlap": {}, "label_distance": None}
