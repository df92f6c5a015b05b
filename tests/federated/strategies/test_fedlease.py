"""FedLEASE: how groups are found, who trains which expert, and how many experts a token uses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hilora.federated.client import Models
from hilora.federated.protocol import Rows
from hilora.federated.strategies.fedlease import Router
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, same
from tests.federated.engine.test_batched import make, some_models, task, train
from tests.federated.strategies.by_hand import ALL, GROUPS, SEEN, Halves, each, everywhere
from tests.federated.strategies.grouped import GroupedHalves


def test_groups_are_found_from_b_and_experts_are_their_means() -> None:
    halves = GroupedHalves("fedlease", shared_head=True)
    halves.begin()
    halves.round()
    halves.round()
    trained = halves.kept("warm")
    halves.begin(1)
    assert torch.equal(halves.server.member[SEEN], GROUPS[SEEN])
    assert len(halves.server.experts) == 2  # K of the largest silhouette, of 2 to 4
    for group in range(2):
        members = SEEN[GROUPS[SEEN] == group]
        torch.testing.assert_close(halves.server.experts.B[0][group], trained.B[0][members].mean(0))
        torch.testing.assert_close(halves.server.experts.A[0][group], trained.A[0][members].mean(0))
    everywhere(halves.server.head.bias, 2 * 2.5)  # clients 0 to 5 move it by their number, twice
    halves.admit()
    assert torch.equal(halves.server.member, GROUPS)  # newcomers too, by what they train of the common start
    assert halves.calls[-1].how["epochs"] == 2


def formed(experts: list[int]) -> Halves:
    """Halves after the warm-up, with clients in these groups; expert k is 100 k everywhere."""
    halves = Halves("fedlease", experts=4)
    halves.begin()
    halves.round()
    halves.begin(1)
    server, first = halves.server, halves.server.first()
    server.member = torch.tensor(experts)
    count = max(experts) + 1
    values = 100.0 * torch.arange(count).view(-1, 1, 1, 1)
    server.experts = first.repeated(count).each(torch.zeros_like).each(lambda value: value + values)
    return halves


def test_a_client_trains_the_expert_of_its_group_beside_the_others() -> None:
    halves = formed([0, 1, 2, 0, 1, 2, 0, 0])
    halves.round()
    call = halves.calls[-1]
    assert call.tier == "cluster"
    assert list(call.models.tiers) == ["cluster", "other1", "other2"]
    own, one, two = (call.models.tiers[tier].taken().B[0][:, 0, 0, 0].tolist() for tier in call.models.tiers)
    assert own == [0, 100, 200, 0, 100, 200]
    assert one == [100, 200, 0, 100, 200, 0]  # the ones that follow
    assert two == [200, 0, 100, 200, 0, 100]
    assert call.models.composition is not None
    (router,) = call.models.composition.tensors().values()
    assert router.shape == (6, 3, 5, 20)  # 2M − 1 places
    each(halves.server.experts.B[0], [(1 + 4) / 2, 100 + (2 + 5) / 2, 200 + (3 + 6) / 2])
    (kept,) = halves.kept("router").tensors().values()
    each(kept[SEEN] - router, [1, 2, 3, 4, 5, 6])
    each(halves.bias()[SEEN], [2, 4, 6, 8, 10, 12])  # a round alone and one together
    assert halves.models(ALL).cluster is not None
    before = halves.server.experts.B[0].clone()
    halves.round(torch.tensor([1]))  # the others' experts stay
    each(halves.server.experts.B[0] - before, [0, 2, 0])


def test_few_clients_have_one_expert_and_no_router() -> None:
    halves = Halves("fedlease")
    halves.begin()
    halves.round(torch.tensor([0, 1]))
    halves.begin(1, torch.tensor([0, 1]))
    models = halves.models(torch.tensor([0, 1]))
    assert (list(models.tiers), models.composition) == (["cluster"], None)
    everywhere(models.tiers["cluster"].taken().B[0], 1.5)


def as_published(x: Tensor, weight: Tensor, experts: int) -> Tensor:
    """The share of each expert, the client's own first, for tokens `[T, in]`: token by token."""
    found = torch.zeros(len(x), experts, dtype=x.dtype)
    for row, token in zip(found, x, strict=True):
        shares = torch.softmax(weight @ token, 0)
        chosen = shares.argsort(descending=True)[:experts]
        for place in chosen:
            row[int(place) if place < experts else 0] += shares[place] / shares[chosen].sum()
    return found


@pytest.mark.parametrize("experts", [2, 3, 4])
def test_shares_are_those_of_the_largest_places(experts: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(2, 3, 2 * experts - 1, 6).double(), torch.randn(2, 40, 6).double()
    tiers = tuple("abcd"[:experts])
    gains = Router(tiers, [weight]).gains(0)(1, x)
    for client in range(2):
        expected = as_published(x[client], weight[client, 1], experts)
        for place, tier in enumerate(tiers):
            gain = gains[tier]
            assert isinstance(gain, Tensor)
            torch.testing.assert_close(gain[client], expected[:, place])
    used = torch.stack([gain for gain in gains.values() if isinstance(gain, Tensor)])
    torch.testing.assert_close(used.sum(0), torch.ones(2, 40).double())
    assert len((used > 0).sum(0).unique()) > 1  # tokens use different numbers of experts


def test_a_token_can_use_its_own_expert_alone() -> None:
    weight = torch.tensor([[[[2.0], [-9.0], [1.0]]]])  # M = 2: own, other, own again
    gains = Router(("own", "other"), [weight]).gains(0)(0, torch.ones(1, 1, 1))
    assert isinstance(gains["own"], Tensor)
    assert isinstance(gains["other"], Tensor)
    assert gains["own"].item() == pytest.approx(1)
    assert gains["other"].item() == 0


def test_together_is_the_same_as_one_by_one(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    torch.manual_seed(0)
    rank = {"root": 2, "cluster": 2, "leaf": 2}
    together, alone = (make(backbone, clients_at_once=size, rank=rank) for size in (4, 1))
    models = some_models(together)
    experts = models.tiers["cluster"]
    tiers = {"cluster": experts, "leaf": Rows(experts.table, 1 - experts.slot)}
    router = Router(("cluster", "leaf"), [torch.randn(4, A.shape[1], 3, A.shape[-1]) for A in experts.table.A])
    models = Models(tiers, models.head, router)
    a, b = (train(engine, task("cluster", penalty=()), models) for engine in (together, alone))
    assert same(a.tiers["cluster"], b.tiers["cluster"], 1e-9)
    assert a.composition is not None
    assert b.composition is not None
    assert same(a.composition, b.composition, 1e-9)
    assert not same(a.composition, router, 1e-3)
    lone = train(together, task("cluster", penalty=()), replace(models, composition=None))
    assert not same(a.tiers["cluster"], lone.tiers["cluster"], 1e-3)


@pytest.mark.slow
def test_all_experts_are_sent_and_one_comes_back(simulate: Simulate) -> None:
    simulation = simulate("fedlease", experts=3)
    moved = simulation.run()["communication"]["per_client"]
    adapter, count = 2 * 4 * 4 * 2 * 24, len(simulation.server.experts)  # type: ignore[attr-defined]
    assert count >= 2
    assert moved["up"] == [(1 + 3) * adapter] * 5 + [adapter // 2]  # after the warm-up, in three rounds; B of a probe
    assert moved["down"] == [3 * count * adapter] * 5 + [count * adapter]
