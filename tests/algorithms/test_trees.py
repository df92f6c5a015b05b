"""Trees of clients, against scikit-learn and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score
from torch import Tensor

from hilora.algorithms.trees import Tree, cosine_distances, frobenius_distances
from hilora.errors import InvalidValueError
from tests.helpers import random


def points(groups: list[int], spread: float = 0.1) -> Tensor:
    """Distances of points near the corners of their groups."""
    corners = torch.eye(max(groups) + 1).double()[groups] * 4
    found = corners + spread * random(len(groups), max(groups) + 1, dtype=torch.float64)
    return torch.cdist(found, found)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_groups_are_those_of_scikit_learn_numbered_by_their_first_client(k: int) -> None:
    distances = points([0, 1, 0, 2, 1, 2, 0, 3], 1.0)
    labels = Tree(distances).groups(k)
    model = AgglomerativeClustering(k, metric="precomputed", linkage="average")
    expected = model.fit_predict(distances.numpy())
    same = labels[:, None] == labels
    assert torch.equal(same, torch.from_numpy(expected[:, None] == expected))
    firsts = [int((labels == group).nonzero()[0]) for group in range(k)]
    assert firsts == sorted(firsts)


def test_more_groups_split_fewer() -> None:
    tree = Tree(points([0, 1, 0, 2, 1, 2, 0, 3], 2.0))
    for k in range(1, 8):
        fewer, more = tree.groups(k), tree.groups(k + 1)
        assert all(len(fewer[more == group].unique()) == 1 for group in range(k + 1))


def test_the_best_cut_is_that_of_the_largest_silhouette() -> None:
    distances = points([0, 1, 0, 2, 1, 2, 0, 1])
    cut = Tree(distances).best(range(2, 8), distances)
    assert (cut.k, cut.labels.tolist()) == (3, [0, 1, 0, 2, 1, 2, 0, 1])
    assert cut.score == pytest.approx(silhouette_score(distances.numpy(), cut.labels.numpy(), metric="precomputed"))
    assert Tree(distances).best(range(1, 8), distances, of_one=0.99).k == 1
    assert Tree(distances).best([1], distances).labels.tolist() == [0] * 8


def test_of_equal_scores_the_fewest_groups_are_taken() -> None:
    cut = Tree(torch.zeros(4, 4)).best(range(2, 4), torch.zeros(4, 4))
    assert cut.k == 2


def test_a_client_alone() -> None:
    assert Tree(torch.zeros(1, 1)).best([1], torch.zeros(1, 1)).labels.tolist() == [0]


def test_distances_by_hand() -> None:
    one = torch.tensor([[[3.0, 0.0]], [[0.0, 4.0]], [[6.0, 0.0]], [[0.0, 0.0]]])  # four clients, one projection
    cosine = cosine_distances([one, -one])
    assert cosine.shape == (2, 4, 4)
    torch.testing.assert_close(cosine[0, 0], torch.tensor([0.0, 1.0, 0.0, 1.0]).double())
    frobenius = frobenius_distances([one])
    torch.testing.assert_close(frobenius[0, 0], torch.tensor([0.0, 5.0, 3.0, 3.0]).double())
    assert not cosine.diagonal(dim1=1, dim2=2).any()


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(InvalidValueError, match=r"expected \[N, N\]"):
        Tree(torch.zeros(2, 3))
    with pytest.raises(InvalidValueError, match="not finite"):
        Tree(torch.full((2, 2), np.nan))
