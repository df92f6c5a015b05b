"""The lower alpha, the less alike clients are, down to one class a client."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from hilora.federated.data.partitions import partition
from tests.federated.data.test_partition import image_set

pytestmark = pytest.mark.slow


def classes_and_overlap(alpha: float, number: int, per_class: int, **options: Any) -> tuple[float, float]:
    """Effective classes of a client (the exponential of their entropy), and what two clients have in common; means."""
    train, test = image_set([per_class] * number), image_set([10] * number)
    counts = partition(train, test, "gl-dir", alpha=alpha, min_images=0, **options).class_counts(train.labels, number)
    shares = counts / counts.sum(1, keepdim=True)
    common = torch.minimum(shares[:, None], shares).sum(2)
    clients = len(shares)
    return float(torch.special.entr(shares).sum(1).exp().mean()), float(
        (common.sum() - clients) / clients / (clients - 1)
    )


@pytest.mark.parametrize("images", [None, 40])
@pytest.mark.parametrize(("clients", "number", "per_class"), [(20, 10, 200), (20, 20, 100), (5, 20, 100)])
def test_the_lower_alpha_the_fewer_classes_and_the_less_in_common(clients, number, per_class, images) -> None:
    options = {"clients": clients, "images_per_client": images, "val_share": 0}
    found = [
        torch.tensor([classes_and_overlap(alpha, number, per_class, seed=seed, **options) for seed in range(5)]).mean(0)
        for alpha in (3, 0.3, 0.03, 0.0099, 1e-3, 1e-5, 1e-300)
    ]
    for (many, much), (few, little) in pairwise(torch.stack(found).tolist()):
        assert few < many * 1.05
        if images is None:  # else that is chance
            assert little < much + 0.02


@pytest.mark.parametrize(("clients", "number", "per_class"), [(20, 10, 200), (20, 20, 100), (10, 10, 7)])
@pytest.mark.parametrize("alpha", [1e-6, 1e-300])
def test_the_limit_of_alpha_is_a_class_a_client(clients, number, per_class, alpha) -> None:
    for seed in range(5):
        options = {"clients": clients, "val_share": 0, "seed": seed}
        classes, _ = classes_and_overlap(alpha, number, per_class, **options)
        assert classes == pytest.approx(1)


def test_a_class_that_a_client_cannot_have_alone_is_followed_by_others_of_its_own() -> None:
    classes, common = classes_and_overlap(1e-6, 20, 100, clients=5, val_share=0, seed=0)
    assert classes == pytest.approx(4)
    assert common == pytest.approx(0, abs=1e-6)


def test_a_small_alpha_follows_the_dirichlet_where_images_abound() -> None:
    train, test = image_set([9000] * 5), image_set([10] * 5)
    options = {"clients": 400, "images_per_client": 100, "val_share": 0, "seed": 0}
    shares = partition(train, test, "gl-dir", alpha=0.0099, **options).class_counts(train.labels, 5) / 100
    beside = partition(train, test, "gl-dir", alpha=0.0101, **options).class_counts(train.labels, 5) / 100
    assert shares.mean(0).tolist() == pytest.approx([0.2] * 5, abs=0.05)
    for one in (shares, beside):
        assert one.var(0).mean() == pytest.approx(0.2 * 0.8 / (5 * 0.01 + 1), rel=0.05)
