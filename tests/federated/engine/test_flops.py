"""FLOPs of a client's training, against a count by hand for the ViT of two blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.flops import Flops
from hilora.federated.engine.trainer import Effort
from hilora.models.backbone import Backbone
from tests.federated.engine.test_batched import make

WIDTH, TOKENS, CLASSES = 24, 5, 6  # four patches and the class token
LINEAR = 2 * TOKENS * 12 * WIDTH**2
ATTENTION = 4 * TOKENS**2 * WIDTH
FORWARD, BACKWARD = LINEAR + ATTENTION, LINEAR + 2 * ATTENTION  # QKᵀ and the mean of V have two gradients each
OUTSIDE = 2 * 4 * (3 * 8 * 8) * WIDTH + 3 * 2 * WIDTH * CLASSES  # the patch embedding, and the head three times
RANK = 2 * TOKENS * 2 * WIDTH  # one rank of one projection, forward


def work(ranks: list[int], trained: tuple[str, ...] = ("root",), factors: str = "AB", parts: Any = None) -> Effort:
    count = len(ranks)
    clients, images, held = torch.arange(count), torch.ones(count), {"root": torch.tensor(ranks)}
    return Effort(clients, images, held, trained, factors, parts, torch.zeros(count))


def count(backbone: Backbone, found: Effort) -> list[float]:
    images: Tensor = Flops(make(backbone), CLASSES).image(found)
    assert images.dtype == torch.float64
    return images.tolist()


def test_adapters_count_by_the_ranks_that_each_client_holds(backbone: Backbone) -> None:
    body = OUTSIDE + 2 * (FORWARD + BACKWARD)
    assert count(backbone, work([2, 1, 0])) == [body + 4 * k * 3 * RANK for k in (2, 1, 0)]  # q and v of two blocks


def test_a_tier_that_is_not_trained_has_no_gradients_of_weights(backbone: Backbone) -> None:
    both = work([1])._replace(ranks={"root": torch.tensor([1]), "leaf": torch.tensor([2])}, trained=("leaf",))
    assert count(backbone, both) == [OUTSIDE + 2 * (FORWARD + BACKWARD) + 4 * (1 * 2 + 2 * 3) * RANK]
    b_alone = OUTSIDE + 2 * (FORWARD + BACKWARD) + 4 * 2.5 * RANK
    assert count(backbone, work([1], factors="B")) == [b_alone]
    assert count(backbone, work([1], factors="")) == [OUTSIDE + 2 * FORWARD + 4 * RANK]  # the head alone


def test_frozen_layers_give_gradients_of_activations_down_to_the_first_that_is_trained(backbone: Backbone) -> None:
    parts = Parts(torch.tensor([[True, False], [False, True]]))
    first, last = count(backbone, work([1, 1], parts=parts))
    assert first == OUTSIDE + 2 * (FORWARD + BACKWARD) + (2 * 3 + 2 * 2) * RANK
    assert last == OUTSIDE + 2 * FORWARD + BACKWARD + (2 * 3 + 2 * 1) * RANK


def test_blocks_that_a_client_lacks_count_nothing(backbone: Backbone) -> None:
    parts = Parts.having(torch.tensor([[True, False], [False, True]]))
    assert count(backbone, work([1, 1], parts=parts)) == [OUTSIDE + FORWARD + BACKWARD + 2 * 3 * RANK] * 2
