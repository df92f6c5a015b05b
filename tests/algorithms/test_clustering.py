from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import SpectralClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score
from torch import Tensor

from hilora.algorithms import clustering
from hilora.algorithms.clustering import (
    cluster_bases,
    cluster_clients,
    cluster_updates,
    ema_columns,
    ema_subspace,
    route_client,
)
from hilora.kernels import orthonormal_basis, subspace_distances
from tests.helpers import random

PROJECTIONS, OUT, RANK = 3, 24, 2
seeds = st.integers(0, 10_000)


def planted(
    labels: Tensor, noise: float, seed: int = 0, dtype: torch.dtype = torch.float64, common: Tensor | float = 0.0
) -> Tensor:
    """Bases [N, P, out, r] around one random subspace for each group, and one that is common to all."""
    groups = int(labels.max()) + 1
    centres = random(groups, PROJECTIONS, OUT, RANK, seed=seed, dtype=dtype)
    own = random(len(labels), PROJECTIONS, OUT, RANK, seed=seed + 1, dtype=dtype)
    return orthonormal_basis(common + centres[labels] + noise * own)


def turned(U: Tensor, seed: int = 5) -> Tensor:
    """The same subspaces in other bases."""
    turn: Tensor = torch.linalg.qr(random(*U.shape[:2], U.shape[-1], U.shape[-1], seed=seed, dtype=U.dtype))[0]
    return U @ turn


def same_groups(a: Tensor, b: Tensor) -> bool:
    return bool(adjusted_rand_score(a, b) == 1)


@settings(max_examples=25, deadline=None)
@given(groups=st.integers(2, 6), noise=st.floats(0.01, 0.8), seed=seeds)
def test_planted_groups_are_found(groups: int, noise: float, seed: int) -> None:
    truth = torch.arange(30) % groups
    found = cluster_clients(planted(truth, noise, seed), 2, 10)
    assert found.k == groups
    assert found.labels.tolist() == truth.tolist(), "numbered in the order of their first client"
    assert found.labels.dtype == torch.int64
    assert found.eigengaps.shape == (29,)
    assert int(found.eigengaps[1:10].argmax()) + 2 == groups


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(3, 12), min_size=2, max_size=5), seed=seeds)
def test_groups_may_differ_in_size(sizes: list[int], seed: int) -> None:
    truth = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    found = cluster_clients(planted(truth, 0.3, seed), len(sizes), len(sizes))
    assert found.k == len(sizes)
    assert same_groups(found.labels, truth)


@settings(max_examples=15, deadline=None)
@given(groups=st.integers(2, 5), noise=st.floats(0.1, 2.0), seed=seeds)
def test_neither_bases_nor_order_count(groups: int, noise: float, seed: int) -> None:
    U = planted(torch.arange(20) % groups, noise, seed)
    found = cluster_clients(U, 2, 8)
    other = cluster_clients(turned(U, seed), 2, 8)
    assert other.k == found.k
    assert torch.equal(other.labels, found.labels)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(seed))
    mixed = cluster_clients(U[order], 2, 8)
    assert mixed.k == found.k
    assert same_groups(mixed.labels, found.labels[order])


@pytest.mark.parametrize("groups", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.1, 1.0, 1.4])
def test_the_groups_are_those_of_sklearn(groups: int, noise: float) -> None:
    U = planted(torch.arange(24) % groups, noise)
    distances = subspace_distances(U)
    sigma = distances[~torch.eye(24, dtype=torch.bool)].median()
    affinity = torch.exp(-(distances**2) / (2 * sigma**2)).numpy()
    model = SpectralClustering(groups, affinity="precomputed", assign_labels="cluster_qr", random_state=0)
    assert same_groups(cluster_clients(U, groups, groups).labels, model.fit_predict(affinity))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("common", [10.0, 100.0])
def test_groups_that_differ_little_are_found(dtype: torch.dtype, common: float) -> None:
    """After an aggregation all clients start from the same adapter: distances are small, their order is what counts."""
    truth = torch.arange(20) % 4
    start = common * random(1, PROJECTIONS, OUT, RANK, seed=9, dtype=torch.float64)
    found = cluster_clients(planted(truth, 0.3, common=start).to(dtype), 2, 8)
    assert found.distances.max() < 4 / common**2
    assert found.k == 4
    assert same_groups(found.labels, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_makes_no_groups_of_equal_clients(dtype: torch.dtype) -> None:
    """Most clients are equal but for rounding, so that the median distance is nothing but noise."""
    truth = torch.tensor([0] * 12 + [1] * 3)
    found = cluster_clients(turned(planted(truth, 0.0).to(dtype)), 2, 6)
    assert found.k == 2
    assert same_groups(found.labels, truth)


def test_k_is_kept_within_its_bounds() -> None:
    U = planted(torch.arange(20) % 5, 0.2)
    assert cluster_clients(U, 2, 3).k in (2, 3)
    assert cluster_clients(U, 7, 9).k in (7, 8, 9)
    assert [cluster_clients(U, k, k).k for k in (2, 3, 5, 8, 19)] == [2, 3, 5, 8, 19]
    assert cluster_clients(U, 20, 50).labels.tolist() == list(range(20)), "as many groups as clients"
    assert cluster_clients(U, 2, 50).k == 5


@pytest.mark.parametrize("k_min", [1, 2])
def test_two_clients(k_min: int) -> None:
    found = cluster_clients(planted(torch.arange(2), 0.0), k_min, 5)
    assert found.labels.tolist() in ([0, 0], [0, 1])
    assert found.k == int(found.labels.max()) + 1
    assert k_min <= found.k <= 2


def test_one_client_is_one_group() -> None:
    found = cluster_clients(planted(torch.zeros(1, dtype=torch.long), 1.0), 1, 5)
    assert found.k == 1
    assert found.labels.tolist() == [0]
    assert found.distances.tolist() == [[0.0]]
    assert len(found.eigengaps) == 0


@pytest.mark.parametrize("k_min", [1, 2, 3])
def test_clients_that_are_all_alike(k_min: int) -> None:
    U = planted(torch.zeros(8, dtype=torch.long), 0.0)
    for bases in (U, turned(U)):
        found = cluster_clients(bases, k_min, 5)
        assert found.distances.max() < 1e-12
        assert sorted(set(found.labels.tolist())) == list(range(found.k))


def test_clients_that_are_all_equally_far() -> None:
    eye = torch.eye(12, dtype=torch.float64).view(1, 12, 12)
    U = torch.stack([eye[..., 2 * i : 2 * i + 2] for i in range(6)])
    found = cluster_clients(U, 2, 4)
    assert found.k == 2, "the smallest of equal ones"
    assert sorted(set(found.labels.tolist())) == [0, 1]


@pytest.mark.parametrize("broken", ["zero", "rank one"])
def test_a_client_that_lacks_directions_spoils_nothing(broken: str) -> None:
    truth = torch.arange(21) % 3
    U = planted(truth, 0.2)
    U[4, :, :, 0 if broken == "zero" else 1 :] = 0
    found = cluster_clients(U, 3, 3)
    others = torch.arange(21) != 4
    assert same_groups(found.labels[others], truth[others])
    assert cluster_clients(U, 1, 6).labels.shape == (21,)
    assert cluster_clients(torch.zeros_like(U), 2, 6).labels.shape == (21,)


@pytest.mark.parametrize(
    ("U", "k_min", "k_max", "message"),
    [
        (random(3, 8, 2), 2, 3, r"expected bases \[N, P, out, r\] of at least one client, got \(3, 8, 2\)"),
        (random(0, 2, 8, 2), 1, 3, r"at least one client, got \(0, 2, 8, 2\)"),
        (random(3, 2, 8, 2), 0, 3, "need 1 <= k_min <= k_max, got 0 and 3"),
        (random(3, 2, 8, 2), 3, 2, "got 3 and 2"),
        (random(3, 2, 8, 2), 4, 5, "3 clients cannot form k_min = 4 clusters"),
        (
            random(3, 2, 8, 2) * torch.tensor([1, torch.nan, torch.inf])[:, None, None, None],
            2,
            3,
            r"clients \[1, 2\] \(pos",
        ),
    ],
)
def test_what_cannot_be_clustered_is_an_error(U: Tensor, k_min: int, k_max: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_clients(U, k_min, k_max)


def test_the_subspace_of_a_group_is_that_of_its_members() -> None:
    truth = torch.tensor([0, 1, 0, 2, 1, 0])
    centres = planted(torch.arange(3), 0.0)
    bases = cluster_bases(turned(centres[truth]), truth)
    assert bases.shape == centres.shape
    torch.testing.assert_close(bases @ bases.mT, centres @ centres.mT, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        bases.mT @ bases, torch.eye(RANK).double().expand(3, PROJECTIONS, -1, -1), rtol=0, atol=1e-12
    )


def test_the_subspace_of_a_group_leads_its_mean_projector() -> None:
    U = planted(torch.zeros(7, dtype=torch.long), 0.5)
    (basis,) = cluster_bases(U, torch.zeros(7, dtype=torch.long))
    vectors = torch.linalg.eigh((U @ U.mT).mean(0)).eigenvectors[..., -RANK:]
    torch.testing.assert_close(basis @ basis.mT, vectors @ vectors.mT, rtol=0, atol=1e-10)


@settings(max_examples=20, deadline=None)
@given(groups=st.integers(2, 6), seed=seeds)
def test_a_new_client_joins_its_group(groups: int, seed: int) -> None:
    truth = torch.arange(30) % groups
    U = planted(truth, 0.5, seed)
    targets = cluster_bases(U[: -2 * groups], truth[: -2 * groups])
    for client in range(30 - 2 * groups, 30):
        group, similarities = route_client(U[client], targets)
        assert group == int(truth[client])
        assert similarities.shape == (groups,)
        again = route_client(turned(U[client][None], seed)[0], turned(targets, seed))
        assert again[0] == group
        torch.testing.assert_close(again[1], similarities, rtol=0, atol=1e-12)


def test_similarities_range_from_orthogonal_to_equal() -> None:
    eye = torch.eye(OUT, dtype=torch.float64).expand(PROJECTIONS, OUT, OUT)
    targets = torch.stack([eye[..., 4:6], eye[..., [0, 7]], eye[..., :2], eye[..., :2]])
    group, similarities = route_client(eye[..., :2], targets)
    assert group == 2, "the first of equal ones"
    assert similarities.tolist() == [0, 0.5, 1, 1]
    assert route_client(eye[..., :4], targets)[1].tolist() == [0, 0.5, 1, 1], "ranks may differ"


@pytest.mark.parametrize(
    ("U", "targets", "message"),
    [
        (random(3, 8, 2), random(3, 8, 2), r"\(3, 8, 2\) and \(3, 8, 2\).*expected \[P, out, r\] and \[K, P, out, r\]"),
        (random(3, 8, 2), random(4, 2, 8, 2), "expected"),
        (random(3, 8, 2), random(4, 3, 9, 2), "expected"),
        (random(3, 8, 2) * torch.nan, random(4, 3, 8, 2), "the bases are not finite"),
        (random(3, 8, 2), random(4, 3, 8, 2) * torch.inf, "the bases are not finite"),
        (torch.zeros(3, 8, 2), random(4, 3, 8, 2), "the client's basis is zero: probe it by some local steps first"),
    ],
)
def test_a_client_that_cannot_be_routed_is_an_error(U: Tensor, targets: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        route_client(U, targets)


def rounds(count: int = 4) -> Tensor:
    """What a client changes in some rounds: [rounds, P, out, r]."""
    return random(count, PROJECTIONS, OUT, RANK, dtype=torch.float64)


def projector(B: Tensor) -> Tensor:
    U = orthonormal_basis(B)
    return U @ U.mT


def averaged(function: Any, changes: Tensor, decay: float) -> Tensor:
    mean = None
    for change in changes:
        mean = function(mean, change, decay)
    assert isinstance(mean, Tensor)
    return mean


def test_the_published_average_is_that_of_normalised_columns() -> None:
    B = rounds(3)
    unit = B / B.flatten(2).norm(dim=-1)[..., None, None]
    expected = 0.81 * unit[0] + 0.9 * 0.1 * unit[1] + 0.1 * unit[2]
    torch.testing.assert_close(averaged(ema_columns, B, 0.9), expected, rtol=0, atol=1e-12)


def test_one_average_depends_on_the_basis_of_a_round_and_the_other_does_not() -> None:
    B = rounds()
    other = torch.cat([B[:2], turned(B[2:])])
    torch.testing.assert_close(projector(B), projector(other), rtol=0, atol=1e-12)
    columns = [projector(averaged(ema_columns, some, 0.5)) for some in (B, other)]
    assert (columns[0] - columns[1]).norm() > 0.1 * columns[0].norm()
    subspaces = [projector(averaged(ema_subspace, some, 0.5)) for some in (B, other)]
    torch.testing.assert_close(subspaces[0], subspaces[1], rtol=0, atol=1e-10)


def test_the_subspace_average_is_that_of_the_moments() -> None:
    first, second = rounds(2)
    norms = [value.flatten(1).norm(dim=-1)[:, None, None] for value in (first, second)]
    moments = 0.7 * (first / norms[0]) @ (first / norms[0]).mT + 0.3 * (second / norms[1]) @ (second / norms[1]).mT
    values, vectors = torch.linalg.eigh(moments)
    expected = (vectors[..., -RANK:] * values[..., None, -RANK:]) @ vectors[..., -RANK:].mT
    F = ema_subspace(ema_subspace(None, first, 0.7), second, 0.7)
    assert F.shape == first.shape
    torch.testing.assert_close(F @ F.mT, expected, rtol=0, atol=1e-12)


def test_room_that_adapters_do_not_fill_leaves_the_centres_of_groups_alone() -> None:
    U = torch.linalg.qr(torch.randn(7, 2, 9, 3, generator=torch.Generator().manual_seed(4)))[0]
    labels = torch.tensor([0, 0, 1, 0, 1, 2, 0])
    centres, padded = cluster_bases(U, labels), cluster_bases(torch.nn.functional.pad(U, (0, 2)), labels)
    assert not padded[..., 3:].any()
    torch.testing.assert_close(projector(padded), projector(centres))


def test_room_that_an_adapter_does_not_fill_leaves_its_moving_subspace_alone() -> None:
    """As for clients with a budget of 3 ranks of 5: rounds that are past must not fill the other two."""
    generator = torch.Generator().manual_seed(3)
    rounds = [torch.randn(4, 2, 9, 3, generator=generator) for _ in range(3)]
    F = padded = None
    for change in rounds:
        F, padded = ema_subspace(F, change, 0.5), ema_subspace(padded, torch.nn.functional.pad(change, (0, 2)), 0.5)
    assert F is not None
    assert padded is not None
    assert not padded[..., 3:].any()
    torch.testing.assert_close(projector(padded), projector(F))


@pytest.mark.parametrize("function", [ema_columns, ema_subspace])
def test_averages_start_with_the_first_round_and_do_not_mind_its_size(function: Any) -> None:
    B = rounds(3)
    torch.testing.assert_close(projector(function(None, B[0], 0.9)), projector(B[0]), rtol=0, atol=1e-12)
    scales = torch.tensor([1e-6, 1.0, 1e6], dtype=torch.float64)[:, None, None, None]
    one, other = averaged(function, B, 0.5), averaged(function, B * scales, 0.5)
    torch.testing.assert_close(one @ one.mT, other @ other.mT, rtol=0, atol=1e-10)
    forgetful = averaged(function, B, 0.0)
    torch.testing.assert_close(projector(forgetful), projector(B[-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("function", [ema_columns, ema_subspace])
def test_a_round_without_a_change_is_no_trouble(function: Any) -> None:
    B = rounds(2)
    B[1] = 0
    assert averaged(function, B, 0.5).isfinite().all()
    torch.testing.assert_close(projector(averaged(function, B, 0.5)), projector(B[0]), rtol=0, atol=1e-10)
    assert not averaged(function, torch.zeros_like(B), 0.5).any()
    first = averaged(function, B.flip(0).float(), 0.5)
    assert first.dtype == torch.float32
    torch.testing.assert_close(projector(first).double(), projector(B[0]), rtol=0, atol=1e-5)


def test_few_groups_among_noise_are_found_and_pure_noise_has_none() -> None:
    """All subspaces nearly as far apart as chance puts them: what groups have in common is a small part of each."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(16) % 4
    common = torch.randn(4, 12, 40, 3, generator=generator)
    noise = torch.randn(16, 12, 40, 3, generator=generator)
    grouped = cluster_clients(torch.linalg.qr(0.9 * common[groups] + noise)[0], 1, 10)
    assert grouped.k == 4
    assert len({(int(a), int(b)) for a, b in zip(grouped.labels, groups, strict=True)}) == 4
    assert grouped.distances[grouped.distances > 0].min() > 0.5
    assert cluster_clients(torch.linalg.qr(noise)[0], 1, 10).k == 1


def test_k_means_on_whole_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(12) % 3
    updates = 3 * torch.randn(3, 50, generator=generator)[groups] + torch.randn(12, 50, generator=generator)
    found = cluster_updates(updates, 1, 6)
    assert found.k == 3
    assert found.labels.tolist() == groups.tolist()
    torch.testing.assert_close(found.distances[0, 1], (updates[0] - updates[1]).double().norm())
    noise = torch.randn(12, 50, generator=generator)
    assert cluster_updates(noise, 1, 6).k == 1
    assert cluster_updates(noise, 2, 6).k >= 2
    assert cluster_updates(noise[:1], 1, 1).k == 1
    with pytest.raises(ValueError, match="k_min"):
        cluster_updates(noise, 3, 2)
    with pytest.raises(ValueError, match="finite"):
        cluster_updates(torch.full((3, 2), torch.nan), 1, 2)


@pytest.mark.parametrize(("clients", "groups"), [(4, 2), (20, 3), (20, 12), (9, 8)])
def test_a_silhouette_is_that_of_sklearn(clients: int, groups: int) -> None:
    points = random(clients, 5).double()
    distances = torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(0).numpy()
    labels = np.arange(clients) % groups  # some groups have one client
    want = silhouette_score(distances, labels, metric="precomputed")
    assert clustering.silhouette(distances, labels) == pytest.approx(want, abs=1e-9)
    assert clustering.silhouette(distances, np.zeros(clients, np.int64)) == 0
    assert clustering.silhouette(np.zeros_like(distances), labels) == 0
