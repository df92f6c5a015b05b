"""What a mean makes of the ranks that some clients do not hold, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.client import Models, Trained
from hilora.federated.privacy import Privacy
from hilora.federated.protocol import Upload
from tests.federated.strategies import by_hand
from tests.federated.strategies.by_hand import SEEN, UNSEEN
from tests.federated.strategies.test_unequal_ranks import RANK, RANKS, InRank, Unequal, fresh

WEAK = torch.tensor([1, 2, 4, 5])  # of one rank or two


@pytest.fixture(autouse=True)
def four_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "fresh", fresh)
    monkeypatch.setattr(by_hand, "RANK", RANK)


class Idle(InRank):
    """Clients that change nothing."""

    def train(self, models: Models, tier: str, **how: Any) -> Trained:
        trained = super().train(models, tier, **how)
        held = {tier: models.tiers[tier].taken() for tier in trained.tiers}
        return Trained(trained.clients, held, models.head.taken(), None, trained.images, trained.loss)


class Still(Unequal):
    def trainer(self, clients: Tensor) -> Any:
        return Idle(clients, self.weights, self.calls)


def with_root(halves: Any) -> Tensor:
    """Gives the server a root of four ranks, in descending order; returns its product."""
    generator = torch.Generator().manual_seed(1)
    halves.begin()
    root = halves.server.root
    Q_A = torch.linalg.qr(torch.randn(3, by_hand.WIDTH, RANK, generator=generator))[0].mT
    Q_B = torch.linalg.qr(torch.randn(3, by_hand.WIDTH, RANK, generator=generator))[0]
    root.A[0][0] = Q_A * torch.tensor([8.0, 4, 2, 1])[:, None]
    root.B[0][0] = Q_B
    return product(root)


def product(root: Any) -> Tensor:
    found: Tensor = root.B[0][0] @ root.A[0][0]
    return found


@pytest.mark.parametrize("robust", ["none", "clip", "trimmed", "median"])
@pytest.mark.parametrize("clients", [SEEN, WEAK])
def test_hilora_stays_where_it_is_if_nobody_changes_anything(robust: str, clients: Tensor) -> None:
    halves = Still("hilora", robust=robust)
    before = with_root(halves)
    for _ in range(3):
        halves.round(clients)
    torch.testing.assert_close(product(halves.server.root), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("aggregation", ["product", "factors"])
def test_a_round_of_clients_with_few_ranks_leaves_the_others_theirs(aggregation: str) -> None:
    halves = Unequal("hilora", aggregation=aggregation)
    before = with_root(halves)
    halves.round(torch.tensor([2, 5]))  # of one rank each
    root = halves.server.root
    assert root.rank.tolist() == [RANK]
    sigma = torch.linalg.svdvals(product(root))[:, :RANK]
    assert (sigma[:, 1:] > 0.9).all(), sigma  # what the two did not hold had 4, 2 and 1
    assert not torch.equal(product(root), before)
    sent = halves.server.configure(halves.stage, SEEN).tiers["root"].taken()
    assert sent.rank.tolist() == RANKS[SEEN].tolist()


def test_hilora_takes_the_mean_of_what_clients_change() -> None:
    halves = Unequal("hilora", [10, 20, 30, 10, 20, 30, 10, 10], rank=RANK, lora_alpha=8)
    before = with_root(halves)
    upload = halves.ask(SEEN, halves._sent(SEEN, 1))
    start = halves.server.configure(halves.stage, SEEN).tiers["root"].taken()
    table, share = upload.tiers["root"], upload.images / upload.images.sum()
    changes = table.B[0] @ table.A[0] - start.B[0] @ start.A[0]
    wanted = before + torch.einsum("n,npoi->poi", share.to(changes), changes)
    U, sigma, Vh = torch.linalg.svd(wanted)
    halves.server.aggregate(halves.stage, upload)
    best = U[..., :RANK] * sigma[:, None, :RANK] @ Vh[:, :RANK]
    torch.testing.assert_close(product(halves.server.root), best, atol=1e-4, rtol=1e-4)


def test_flexlora_lets_ranks_fade_that_few_can_hold_as_published() -> None:
    halves = Still("flexlora")
    before = torch.linalg.svdvals(with_root(halves))[:, :RANK]
    halves.round(SEEN)
    after = torch.linalg.svdvals(product(halves.server.root))[:, :RANK]
    held = torch.stack([(RANKS[SEEN] > rank).double().mean() for rank in range(RANK)])  # the share of the clients
    torch.testing.assert_close(after, before * held.to(before), atol=1e-5, rtol=1e-5)


def test_ranks_of_flexlora_can_be_trained_after_a_round_without_them() -> None:
    """With A and B both zero they could not."""
    halves = Unequal("flexlora")
    before = halves.server.root.A[0].clone()
    halves.one_round(torch.tensor([2]))  # of one rank
    root = halves.server.root
    assert not root.B[0][..., 1:].any()
    assert torch.equal(root.A[0][:, :, 1:], before[:, :, 1:])
    for _ in range(3):
        halves.round(torch.tensor([0, 3]))
        assert (halves.server.root.A[0].norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize("name", ["flexlora", "hetlora", "hilora"])
def test_clipping_counts_nothing_that_a_client_does_not_hold(name: str) -> None:
    halves = Still(name, robust="clip", robust_bound=1e6)
    before = with_root(halves)
    halves.round(SEEN)
    torch.testing.assert_close(product(halves.server.root), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["flexlora", "hilora"])
def test_noise_is_in_the_ranks_that_a_client_holds(name: str) -> None:
    options: dict[str, Any] = {"groups": "true"} if name == "hilora" else {}
    halves = Unequal(name, **options)
    halves.begin()
    download = halves._sent(SEEN, 1)
    upload = halves.ask(SEEN, download)
    private = Privacy(by_hand.settings(rank=RANK, dp_clip=1.0, dp_noise=1.0))
    found: Upload = private.release(upload, download, torch.ones(len(SEEN), dtype=torch.bool), 1, len(SEEN))
    table = found.tiers["root"]
    assert table.rank.tolist() == RANKS[SEEN].tolist()
    within = table.leading(table.rank)
    assert torch.equal(table.A[0], within.A[0])
    assert torch.equal(table.B[0], within.B[0])
    assert within.B[0].flatten(1).any(1).all()


@pytest.mark.parametrize(("energy", "expected"), [({}, RANKS[UNSEEN].tolist()), ({"rank_energy": 0.9}, [1, 1])])
def test_a_newcomers_leaf_is_cut_to_what_it_learnt(energy: dict[str, Any], expected: list[int]) -> None:
    """Training adds one number to all of B, so that what it learns has one direction."""
    halves = Unequal("hilora", **energy).all_rounds()
    halves.admit()
    assert halves.personalised().tiers["leaf"].taken().rank.tolist() == expected
