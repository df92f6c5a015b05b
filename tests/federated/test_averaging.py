"""Robust means of what clients send, worked out by hand, and in every method: client i adds i + 1 to all it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.averaging import Averaging
from hilora.federated.protocol import Head
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import STRATEGIES
from tests.algorithms.test_aggregation import make
from tests.federated.conftest import same
from tests.federated.strategies.by_hand import ALL, SEEN, Halves, each, everywhere

RULES = ("clip", "trimmed", "median")


def averaging(robust: str, **options: Any) -> Averaging:
    return Averaging(TrainingSettings(robust=robust, **options))


def heads(*values: float) -> Head:
    """Heads of one class on one feature, whose bias stays at zero."""
    weight = torch.tensor(values).double().view(-1, 1, 1)
    return Head(weight, torch.zeros(len(values), 1).double())


START = heads(1.0)
IMAGES = torch.tensor([10, 1, 1, 1, 1000, 0])
SENT = heads(1.0, 2.0, 3.0, 4.0, -99.0, 1e9)  # changes of 0, 1, 2, 3 and -100; the last has no images


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"robust": "none"}, (10 * 1 + 2 + 3 + 4 - 99 * 1000) / 1013),
        ({"robust": "clip"}, 1 + (0 + 1 + 2 + 2 - 2) / 5),  # the median norm is 2
        ({"robust": "clip", "robust_bound": 1.0}, 1 + (0 + 1 + 1 + 1 - 1) / 5),
        ({"robust": "trimmed"}, (1 + 2 + 3) / 3),
        ({"robust": "trimmed", "robust_trim": 0.4}, 2.0),
        ({"robust": "median"}, 2.0),
    ],
)
def test_means_of_heads_by_hand(options: dict[str, Any], expected: float) -> None:
    found = averaging(**options).mean(SENT, IMAGES, START)
    assert found.weight.shape == (1, 1, 1)
    assert found.weight.item() == pytest.approx(expected, abs=1e-4)
    assert found.bias.item() == 0
    own_starts = averaging(**options).mean(SENT, IMAGES, START.repeated(6))
    assert own_starts.weight.item() == pytest.approx(found.weight.item())


def test_clients_may_start_from_points_of_their_own() -> None:
    found = averaging("clip", robust_bound=1.0).mean(heads(5.0, 10.0), torch.ones(2), heads(3.0, 10.5))
    assert found.weight.item() == pytest.approx((4 + 10) / 2)


def tables(clients: int = 5) -> tuple[AdapterTable, AdapterTable, list[tuple[Tensor, Tensor]]]:
    """What clients sent, two shapes of projections, what they started from, and both as products."""
    (A, B), (C, D) = make(clients + 1, 2, (3,), 9, 7, 1), make(clients + 1, 2, (2,), 5, 7, 2)
    B[1:clients] = B[:1] + 0.1 * B[1:clients]  # near each other, but for one
    A[1:clients], C[1:clients], D[1:clients] = A[:1], C[:1], D[:1]
    A[clients - 1] *= 1e3
    sent, start = AdapterTable([A[:-1], C[:-1]], [B[:-1], D[:-1]]), AdapterTable([A[-1:], C[-1:]], [B[-1:], D[-1:]])
    return sent, start, [((B @ A)[:-1], (B @ A)[-1]), ((D @ C)[:-1], (D @ C)[-1])]


def best(product: Tensor, rank: int = 2) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(product, full_matrices=False)
    found: Tensor = U[..., :rank] * sigma[..., None, :rank] @ Vh[..., :rank, :]
    return found


@pytest.mark.parametrize("bound", [None, 3.0])
def test_products_are_clipped_as_products(bound: float | None) -> None:
    sent, start, dense = tables()
    found = averaging("clip", robust_bound=bound).product_mean(sent, torch.ones(5), start)
    norms = torch.cat([(now - before).flatten(1) for now, before in dense], 1).norm(dim=1)
    scales = ((norms.quantile(0.5) if bound is None else bound) / norms).clamp_max(1)
    for (A, B), (now, before) in zip(found.factors, dense, strict=True):
        expected = before + (scales.view(-1, 1, 1, 1) * (now - before)).mean(0)
        torch.testing.assert_close((B @ A)[0], best(expected), rtol=0, atol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_products_of_clients_who_agree_stay_what_they_are(rule: str) -> None:
    sent, start, dense = tables()
    sent = sent.rows(torch.tensor([0, 0, 0, 4]))  # three the same, one far away
    found = averaging(rule, robust_trim=0.25).product_mean(sent, torch.tensor([1, 1, 1, 1000]), start)
    for (A, B), (now, before) in zip(found.factors, dense, strict=True):
        moved = ((B @ A)[0] - now[0]).norm()
        assert moved < (1.0 if rule == "clip" else 1e-3) * (now[0] - before).norm()


@pytest.mark.parametrize("rule", RULES)
def test_a_table_may_lack_a_factor_and_keeps_its_rank(rule: str) -> None:
    sent, start, _ = tables()
    found = averaging(rule).mean(sent.only("A"), torch.ones(5), start)
    assert (len(found), found.B, found.rank.tolist()) == (1, (), [2])
    for mean, rows in zip(found.A, sent.A, strict=True):
        assert mean.shape == (1, *rows.shape[1:])
        assert mean.dtype == torch.float64


SHARABLE = [name for name, kind in STRATEGIES.items() if "shared_head" in kind.Settings.model_fields]
AVERAGE = [name for name in STRATEGIES if name not in ("local-lora", "central")]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", AVERAGE)
def test_no_method_takes_a_mean_in_which_one_client_counts_beyond_bounds(name: str, rule: str) -> None:
    """Client 5 claims a million images in the place of 10: by images its numbers would be everybody's."""
    extra: dict[str, Any] = {"groups": "true", "k_max": 4} if name in ("hilora", "head-only") else {}
    extra |= {"shared_head": True} if name in SHARABLE else {}
    options: dict[str, Any] = {"rounds": [1, 1, 1], "robust": rule, "robust_trim": 0.2, **extra}
    honest, claimed = Halves(name, **options).all_rounds(), Halves(name, [10] * 5 + [10**6] * 3, **options).all_rounds()
    a, b = honest.models(SEEN), claimed.models(SEEN)
    for tier, rows in a.tiers.items():
        assert same(b.tiers[tier].taken(), rows.taken(), 1e-5)
    assert same(b.head.taken(), a.head.taken(), 1e-5)


@pytest.mark.parametrize(("rule", "mean"), [("clip", (1 + 2 + 3 + 3.5 * 3) / 6), ("trimmed", 3.5), ("median", 3.5)])
def test_fedit_by_hand(rule: str, mean: float) -> None:
    halves = Halves("fedit", robust=rule)
    A = halves.server.root.A[0].clone()
    halves.one_round()
    torch.testing.assert_close(halves.server.root.A[0], A + mean, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(halves.bias(), torch.full((8, 4), mean), rtol=1e-4, atol=1e-3)


def test_fedalt_trims_the_rest_of_the_world_for_each_client() -> None:
    halves = Halves("fedalt", robust="trimmed").one_round()
    rest = halves.models(ALL).tiers["root"].taken()
    # Of five others one goes at either end; a newcomer has six others, of whom two go.
    each(rest.B[0], [4, 4, (2 + 4 + 5) / 3, (2 + 3 + 5) / 3, 3, 3, 3.5, 3.5])


@pytest.mark.parametrize("rule", RULES)
def test_nobody_with_images_changes_nothing(rule: str) -> None:
    halves = Halves("fedit", [0] * 8, robust=rule).one_round()
    everywhere(halves.server.root.B[0], 0)
