"""The cascade, and the groups that it finds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.engine.state import Models, State, Trained, stream
from hilora.federated.engine.work import Work
from hilora.federated.grouping.grouping import Grouping
from hilora.federated.strategies.fedit import FedIT
from hilora.federated.strategies.hilora import HiLoRA
from tests.federated.conftest import same
from tests.federated.strategies.by_hand import (
    CLIENTS,
    GROUPS,
    HEAD,
    PROJECTIONS,
    RANK,
    SEEN,
    UNSEEN,
    WIDTH,
    fresh,
    run,
)


class Grouped(Work):
    """In the place of `Work`: clients that train as `train` does."""

    def __init__(self) -> None:
        self.trained: list[int] = []
        self.true_groups = GROUPS

    def train(self, clients: Tensor, models: Models, tier: str, **more: Any) -> Trained:
        self.trained += clients.tolist()
        return train(clients, models, tier)


def train(clients: Tensor, models: Models, tier: str, seed: int = 0) -> Trained:
    """Local training that pulls B into directions of the client's group, and the head to the client's number."""
    start, head = models.tiers[tier].taken(), models.head.taken()
    directions = torch.linalg.qr(torch.randn(2, PROJECTIONS, WIDTH, RANK, generator=stream(0, "directions")))[0]
    noise = torch.stack(
        [torch.randn(PROJECTIONS, WIDTH, RANK, generator=stream(seed, "noise", int(c))) for c in clients]
    )
    inputs = torch.randn(PROJECTIONS, RANK, WIDTH, generator=stream(0, "inputs"))
    left, _, right = torch.linalg.svd(inputs @ start["A0"].mT)
    pull = (directions[GROUPS[clients]] + 0.1 * noise) @ left @ right  # turns with A: B A gains the same in any basis
    adapters = {"A0": start["A0"], "B0": start["B0"] + pull}
    number = clients.float()
    head = {"weight": head["weight"] + number.view(-1, 1, 1), "bias": head["bias"] + number.view(-1, 1)}
    return Trained(adapters, head, torch.full((len(clients),), 10), torch.ones(len(clients)))


def cascade(**options: Any) -> HiLoRA:
    """A HiLoRA whose clients have trained all stages."""
    method = HiLoRA(run(**options), fresh, HEAD, CLIENTS)
    for stage in method.stages():
        method.begin(stage.tier, SEEN, Grouped())
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
    method.admit(UNSEEN, Grouped())
    assert method.grouping.member.tolist() == GROUPS.tolist()
    models = method.models(UNSEEN)
    assert not models.tiers["leaf"].taken()["B0"].any()  # a fresh leaf: root and cluster alone predict
    assert same(models.head.taken(), {k: v[GROUPS[UNSEEN]] for k, v in method.heads["cluster"].items()})


def test_a_client_that_was_never_sampled_is_placed_by_a_probe() -> None:
    method = HiLoRA(run(k_min=2, k_max=2), fresh, HEAD, CLIENTS)  # four clients are too few to tell
    often = torch.tensor([0, 1, 2, 3])
    method.begin("root", SEEN, Grouped())
    method.aggregate("root", often, train(often, method.models(often), "root"))
    work = Grouped()
    method.begin("cluster", SEEN, work)
    assert work.trained == [4, 5]
    assert method.grouping.member[SEEN].tolist() == GROUPS[SEEN].tolist()
    found = method.clustering()
    assert found is not None
    assert found.labels.tolist() == GROUPS[SEEN].tolist()
    assert found.distances.shape == (6, 6)


def test_clients_of_different_rounds_are_compared_by_probes_of_one_root() -> None:
    method = HiLoRA(run(participation=0.5), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, Grouped())
    for clients in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 0])):
        method.aggregate("root", clients, train(clients, method.models(clients), "root"))
    work = Grouped()
    method.begin("cluster", SEEN, work)
    assert work.trained == [0, 1, 2, 3, 4, 5]


def test_the_root_averages_products_and_clusters_only_their_members() -> None:
    method = HiLoRA(run(), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, Grouped())
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

    method.begin("cluster", SEEN, Grouped())
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
    method.begin("root", SEEN, Grouped())
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
    class Idle(Grouped):
        def train(self, clients: Tensor, models: Models, tier: str, **more: Any) -> Trained:
            return train(clients, models, tier)._replace(images=torch.zeros(len(clients)))

    with pytest.raises(ValueError, match="no client has an image"):
        HiLoRA(run(), fresh, HEAD, CLIENTS).begin("cluster", SEEN, Idle())
    method = HiLoRA(run(), fresh, HEAD, CLIENTS)
    method.begin("cluster", SEEN[:1], Grouped())
    assert method.grouping.member[0] == 0


@pytest.mark.parametrize("groups", ["true", "random", "kmeans"])
def test_groups_may_come_from_elsewhere(groups: str) -> None:
    method = cascade(groups=groups)
    member = method.grouping.member[SEEN]
    found = method.clustering()
    assert found is not None
    assert found.k == 2
    assert sorted(member.bincount().tolist()) == [3, 3]
    assert (member.tolist() == GROUPS[SEEN].tolist()) == (groups != "random")
    method.admit(UNSEEN, Grouped())
    if groups != "random":
        assert method.grouping.member[UNSEEN].tolist() == GROUPS[UNSEEN].tolist()


def test_kmeans_compares_what_clients_change_of_the_product() -> None:
    grouping = Grouping(run(groups="kmeans"), clients=3)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    A, B = drawn(1, 2, 2, 5), drawn(1, 2, 4, 2)
    turn = torch.linalg.qr(drawn(2, 2)).Q
    trained = {"A0": A + drawn(3, 2, 2, 5), "B0": B + drawn(3, 2, 4, 2)}
    grouping.remember(torch.arange(2), {name: value[:2] for name, value in trained.items()}, {"A0": A, "B0": B})
    turned = {"A0": turn.T @ A, "B0": B @ turn}  # the same root in another basis
    grouping.remember(torch.tensor([2]), {"A0": turn.T @ trained["A0"][2:], "B0": trained["B0"][2:] @ turn}, turned)
    change = (trained["B0"] @ trained["A0"] - B @ A).flatten(1)
    everyone = torch.arange(3)
    torch.testing.assert_close(grouping._inner(everyone, everyone), change @ change.T)
    grouping.member = torch.tensor([0, 1, -1])
    grouping.join(torch.tensor([2]))
    assert grouping.member[2] == torch.cdist(change[2:], change[:2]).argmin()


def test_true_groups_are_asked_for_where_there_are_none() -> None:
    method = HiLoRA(run(groups="true"), fresh, HEAD, CLIENTS)
    work = Grouped()
    work.true_groups = None
    with pytest.raises(ValueError, match="true groups"):
        method.begin("cluster", SEEN, work)


def test_factors_may_be_averaged_apart() -> None:
    method = HiLoRA(run(aggregation="factors"), fresh, HEAD, CLIENTS)
    method.begin("root", SEEN, Grouped())
    trained = train(SEEN, method.models(SEEN), "root")
    method.aggregate("root", SEEN, trained)
    torch.testing.assert_close(method.root["B0"][0], trained.adapters["B0"].mean(0))
    torch.testing.assert_close(method.root["A0"][0], trained.adapters["A0"].mean(0))


def test_only_hilora_has_penalties() -> None:
    assert HiLoRA.adapted(run(gamma_root=0.3)).gamma_root == 0.3
    assert FedIT.adapted(run(gamma_root=0.3)).gamma_root == 0
    with pytest.raises(ValueError, match="has no options"):
        HiLoRA.adapted(run(options={"k": 3}))
