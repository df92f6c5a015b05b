"""What the server does with what came back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.settings import RunConfig
from hilora.federated.state import Models, State, Trained, stream
from hilora.federated.strategies import STRATEGIES, FedIT, HiLoRA, LocalLoRA
from tests.federated.conftest import same

CLIENTS, PROJECTIONS, WIDTH, RANK = 8, 3, 20, 2
GROUPS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 1])  # the last two are unseen
SEEN, UNSEEN = torch.arange(6), torch.tensor([6, 7])
HEAD = {"weight": torch.zeros(1, 4, 5), "bias": torch.zeros(1, 4)}


def fresh(tier: str, slots: int, generator: torch.Generator) -> State:
    A = torch.randn(slots, PROJECTIONS, RANK, WIDTH, generator=generator)
    return {"A0": A, "B0": torch.zeros(slots, PROJECTIONS, WIDTH, RANK)}


def run(**options: Any) -> RunConfig:
    fields: dict[str, Any] = {"rank": RANK, "rounds": [2, 2, 1], "k_max": 4}
    return RunConfig(**(fields | options))


def train(clients: Tensor, models: Models, tier: str, epochs: int = 1, seed: int = 0) -> Trained:
    """Local training that pulls B into directions of the client's group, and the head to the client's number."""
    start, head = models.tiers[tier].taken(), models.head.taken()
    directions = torch.linalg.qr(torch.randn(2, PROJECTIONS, WIDTH, RANK, generator=stream(0, "directions")))[0]
    noise = torch.stack(
        [torch.randn(PROJECTIONS, WIDTH, RANK, generator=stream(seed, "noise", int(c))) for c in clients]
    )
    adapters = {"A0": start["A0"], "B0": start["B0"] + directions[GROUPS[clients]] + 0.1 * noise}
    number = clients.float()
    head = {"weight": head["weight"] + number.view(-1, 1, 1), "bias": head["bias"] + number.view(-1, 1)}
    return Trained(adapters, head, torch.full((len(clients),), 10), torch.ones(len(clients)))


def cascade(**options: Any) -> HiLoRA:
    """A HiLoRA whose clients have trained all stages."""
    method = HiLoRA(run(**options), fresh, HEAD, CLIENTS)
    for stage in method.stages():
        method.begin(stage.tier, SEEN, train)
        for seed in range(stage.rounds):
            trained = train(SEEN, method.models(SEEN), stage.tier, seed=seed)
            method.aggregate(stage.tier, SEEN, trained)
    return method


def product(state: State) -> Tensor:
    return state["B0"] @ state["A0"]


def test_groups_are_found_and_unseen_clients_join_theirs() -> None:
    method = cascade()
    found = method.clustering()
    assert found is not None
    assert found.k == 2
    assert found.labels.tolist() == GROUPS[SEEN].tolist()
    method.admit(UNSEEN, train)
    assert method.member.tolist() == GROUPS.tolist()
    models = method.models(UNSEEN)
    assert not models.tiers["leaf"].taken()["B0"].any()  # a fresh leaf: root and cluster alone predict
    assert same(models.head.taken(), {k: v[GROUPS[UNSEEN]] for k, v in method.heads["cluster"].items()})


def test_a_client_that_was_never_sampled_is_placed_by_a_probe() -> None:
    method = HiLoRA(run(), fresh, HEAD, CLIENTS)
    often = torch.tensor([0, 1, 2, 3])
    method.begin("root", SEEN, train)
    method.aggregate("root", often, train(often, method.models(often), "root"))
    probed: list[int] = []

    def fit(clients: Tensor, models: Models, tier: str, epochs: int) -> Trained:
        assert (tier, epochs) == ("root", 1)
        probed.extend(clients.tolist())
        return train(clients, models, tier)

    method.begin("cluster", SEEN, fit)
    assert probed == [4, 5]
    assert method.member[SEEN].tolist() == GROUPS[SEEN].tolist()
    found = method.clustering()
    assert found is not None
    assert found.labels.tolist() == GROUPS[SEEN].tolist()
    assert found.distances.shape == (6, 6)


def test_clients_of_different_rounds_are_compared_by_probes_of_one_root() -> None:
    method = HiLoRA(run(participation=0.5), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, train)
    for clients in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0])):
        method.aggregate("root", clients, train(clients, method.models(clients), "root"))
    probed: list[int] = []

    def fit(clients: Tensor, models: Models, tier: str, epochs: int) -> Trained:
        probed.extend(clients.tolist())
        return train(clients, models, tier)

    method.begin("cluster", SEEN, fit)
    assert probed == [0, 1, 2, 3, 4, 5]


def test_the_root_averages_products_and_clusters_only_their_members() -> None:
    method = HiLoRA(run(), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, train)
    trained = train(SEEN, method.models(SEEN), "root")
    weights = torch.tensor([10.0, 20, 30, 10, 20, 10])
    trained = trained._replace(images=weights)
    method.aggregate("root", SEEN, trained)
    share = (weights / weights.sum()).view(-1, 1, 1, 1)
    U, S, Vh = torch.linalg.svd((share * product(trained.adapters)).sum(0), full_matrices=False)
    best = U[..., :RANK] * S[..., None, :RANK] @ Vh[..., :RANK, :]
    torch.testing.assert_close(product(method.root)[0], best, rtol=1e-4, atol=1e-4)
    expected = (weights / weights.sum() * SEEN).sum()
    torch.testing.assert_close(method.heads["root"]["bias"], expected.expand(1, 4))

    method.begin("cluster", SEEN, train)
    members = torch.tensor([0, 2])
    before = {k: v.clone() for k, v in method.cluster.items()}
    method.aggregate("cluster", members, train(members, method.models(members), "cluster"))
    assert not torch.equal(method.cluster["B0"][0], before["B0"][0])
    assert torch.equal(method.cluster["B0"][1], before["B0"][1])  # nobody of it was sampled
    torch.testing.assert_close(method.heads["cluster"]["bias"][0], expected + torch.tensor([1.0] * 4))


def test_leaves_are_private() -> None:
    method = cascade()
    leaf = {k: v.clone() for k, v in method.leaf.items()}
    one = torch.tensor([3])
    method.aggregate("leaf", one, train(one, method.models(one), "leaf", seed=9))
    others = [i for i in range(CLIENTS) if i != 3]
    assert torch.equal(method.leaf["B0"][others], leaf["B0"][others])
    assert not torch.equal(method.leaf["B0"][3], leaf["B0"][3])


def test_rho_is_undefined_in_the_first_round_and_ends_the_root_when_small() -> None:
    method = HiLoRA(run(tau_rel=0.01), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, train)
    assert method.aggregate("root", SEEN, train(SEEN, method.models(SEEN), "root")) == {"rho": None}
    second = method.aggregate("root", SEEN, train(SEEN, method.models(SEEN), "root"))
    assert second["rho"] > 0.01
    assert not second["stop"]
    unchanged = method.models(SEEN)
    nothing = Trained(unchanged.tiers["root"].taken(), unchanged.head.taken(), torch.ones(6), torch.ones(6))
    third = method.aggregate("root", SEEN, nothing)
    assert third["rho"] < 1e-5
    assert third["stop"]


def test_no_client_with_images_is_an_error_and_one_is_a_cluster() -> None:
    def idle(clients: Tensor, models: Models, tier: str, epochs: int) -> Trained:
        return train(clients, models, tier)._replace(images=torch.zeros(len(clients)))

    with pytest.raises(ValueError, match="no client has an image"):
        HiLoRA(run(), fresh, HEAD, CLIENTS).begin("cluster", SEEN, idle)
    method = HiLoRA(run(), fresh, HEAD, CLIENTS)
    method.begin("cluster", SEEN[:1], train)
    assert method.member[0] == 0


def test_fedit_averages_the_factors_one_by_one() -> None:
    method = FedIT(run(), fresh, HEAD, CLIENTS)
    trained = train(SEEN, method.models(SEEN), "root")
    method.aggregate("root", SEEN, trained)
    torch.testing.assert_close(method.root["B0"][0], trained.adapters["B0"].mean(0))
    torch.testing.assert_close(method.models(UNSEEN).head.taken()["bias"], torch.full((2, 4), 2.5))


def test_local_lora_shares_nothing() -> None:
    method = LocalLoRA(run(), fresh, HEAD, CLIENTS)
    before = {k: v.clone() for k, v in method.leaf.items()}
    method.aggregate("leaf", SEEN, train(SEEN, method.models(SEEN), "leaf"))
    assert torch.equal(method.leaf["B0"][UNSEEN], before["B0"][UNSEEN])
    assert method.head["bias"][:6, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert len(method.leaf["A0"].flatten(1).unique(dim=0)) == CLIENTS  # each its own start


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_state_goes_through_a_checkpoint(name: str) -> None:
    method, other = (STRATEGIES[name](run(), fresh, HEAD, CLIENTS) for _ in range(2))
    tier = method.stages()[0].tier
    method.aggregate(tier, SEEN, train(SEEN, method.models(SEEN), tier))
    other.load_state_dict(method.state_dict())
    assert same(other.models(SEEN).tiers[tier].taken(), method.models(SEEN).tiers[tier].taken())
    with pytest.raises(ValueError, match="not a state of"):
        other.load_state_dict({"foreign": 1})
