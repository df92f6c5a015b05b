"""The cascade."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hilora.errors import InvalidValueError
from hilora.federated.data.partitions import Client, Population
from hilora.federated.protocol import Upload
from hilora.federated.ranks import energy_ranks
from hilora.federated.strategies import STRATEGIES
from tests.federated.conftest import Simulate, copied, same, squares
from tests.federated.strategies.by_hand import CLIENTS, GROUPS, RANK, SEEN, UNSEEN, everywhere
from tests.federated.strategies.grouped import GroupedHalves, products


def test_groups_are_found_and_unseen_clients_join_theirs() -> None:
    halves = GroupedHalves("hilora", k_max=4).all_rounds()
    found = halves.server.clustering()
    assert found is not None
    assert found.k == 2
    assert found.labels.tolist() == GROUPS[SEEN].tolist()
    halves.admit()
    assert halves.server.grouping.member.tolist() == GROUPS.tolist()
    models = halves.models(UNSEEN)
    assert not models.tiers["leaf"].taken().B[0].any()  # a fresh leaf: root and cluster alone predict
    assert same(models.head.taken(), halves.server.heads["cluster"].rows(GROUPS[UNSEEN]))


def test_a_client_that_was_never_sampled_is_placed_by_a_probe() -> None:
    halves = GroupedHalves("hilora", k_min=2, k_max=2)  # four clients are too few to tell
    halves.begin()
    halves.round(torch.tensor([0, 1, 2, 3]))
    halves.calls.clear()
    halves.begin(1)
    assert halves.trained == [4, 5]
    assert halves.calls[0].how["epochs"] == 1
    assert halves.server.grouping.member[SEEN].tolist() == GROUPS[SEEN].tolist()
    found = halves.server.clustering()
    assert found is not None
    assert found.labels.tolist() == GROUPS[SEEN].tolist()
    assert found.distances.shape == (6, 6)


def test_clients_of_different_rounds_are_compared_by_probes_of_one_root() -> None:
    halves = GroupedHalves("hilora", participation=0.5, k_max=4)
    halves.begin()
    for clients in ([0, 1, 2], [3, 4, 0]):
        halves.round(torch.tensor(clients))
    halves.calls.clear()
    halves.begin(1)
    assert halves.trained == [0, 1, 2, 3, 4, 5]


def test_a_probe_sends_the_root_back_and_no_head() -> None:
    halves = GroupedHalves("hilora", k_max=4).all_rounds()
    uploads: list[Upload] = []

    def ask(*asked: Any) -> Upload:
        uploads.append(halves.ask(*asked))
        return uploads[-1]

    halves.server.admit(UNSEEN, ask)
    (upload,) = uploads
    assert list(upload.tiers) == ["root"]
    assert upload.head is None


def test_the_root_averages_products_and_clusters_only_their_members() -> None:
    halves = GroupedHalves("hilora", [10, 20, 30, 10, 20, 10, 10, 10], k_max=4)
    halves.begin()
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN).at(1))
    halves.server.aggregate(halves.stage, upload)
    share = upload.images / upload.images.sum()
    mean = (share.view(-1, 1, 1, 1) * products(upload.tiers["root"])).sum(0)
    U, S, Vh = torch.linalg.svd(mean, full_matrices=False)
    best = U[..., :RANK] * S[..., None, :RANK] @ Vh[..., :RANK, :]
    torch.testing.assert_close(products(halves.server.root)[0], best, rtol=1e-4, atol=1e-4)
    expected = (share * SEEN).sum()
    torch.testing.assert_close(halves.server.heads["root"].bias, expected.expand(1, 4))

    halves.begin(1)
    before = copied(halves.server.cluster)
    halves.round(torch.tensor([0, 2]))
    assert not torch.equal(halves.server.cluster.B[0][0], before.B[0][0])
    assert torch.equal(halves.server.cluster.B[0][1], before.B[0][1])  # nobody of it was sampled
    heads = halves.server.heads["cluster"].bias
    torch.testing.assert_close(heads[0], expected + torch.full((4,), 30 * 2 / 40))


def test_leaves_and_their_heads_are_private() -> None:
    halves = GroupedHalves("hilora", k_max=4).all_rounds()
    leaf, head = copied(halves.kept("leaf")), copied(halves.kept("head"))
    server = {name: copied(one) for name, one in halves.server.heads.items()}
    halves.round(torch.tensor([3]))
    others = torch.tensor([i for i in range(CLIENTS) if i != 3])
    for before, after in ((leaf, halves.kept("leaf")), (head, halves.kept("head"))):
        assert same(after.rows(others), before.rows(others))
        assert not same(after.rows(torch.tensor([3])), before.rows(torch.tensor([3])))
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN).at(2))
    assert (dict(upload.tiers), upload.head) == ({}, None)
    assert all(same(halves.server.heads[name], one) for name, one in server.items())


def test_rho_is_undefined_in_the_first_round_and_ends_the_root_when_small() -> None:
    halves = GroupedHalves("hilora", tau_rel=0.01, k_max=4)
    halves.begin()
    assert halves.round() == {"rho": None}
    second = halves.round()
    assert second["rho"] > 0.01
    assert not second["stop"]
    models = halves.models(SEEN)
    nothing = Upload(SEEN, torch.ones(6), {"root": models.tiers["root"].taken()}, models.head.taken())
    third = halves.server.aggregate(halves.stage, nothing)
    assert third["rho"] < 1e-5
    assert third["stop"]


def test_no_client_with_images_is_an_error_and_one_is_a_cluster() -> None:
    with pytest.raises(InvalidValueError, match="no client has an image"):
        GroupedHalves("hilora", [0] * CLIENTS).begin(1)
    halves = GroupedHalves("hilora")
    halves.begin(1, SEEN[:1])
    assert halves.server.grouping.member[0] == 0


def test_unequal_numbers_of_images_and_clients_without_any() -> None:
    """Client 4 has none: it joins the largest cluster, and adds nothing to a mean."""
    halves = GroupedHalves("hilora", [10, 40, 30, 10, 0, 10, 0, 10], k_min=2, k_max=2).all_rounds()
    member = halves.server.grouping.member
    assert member[[0, 1, 2, 3, 5]].tolist() == [0, 1, 0, 1, 1]
    assert member[4] == 1
    halves.admit()
    assert member[UNSEEN].tolist() == [1, 1]


def test_factors_may_be_averaged_apart() -> None:
    halves = GroupedHalves("hilora", aggregation="factors")
    halves.begin()
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN).at(1))
    halves.server.aggregate(halves.stage, upload)
    table = upload.tiers["root"]
    torch.testing.assert_close(halves.server.root.B[0], table.B[0].mean(0, keepdim=True))
    torch.testing.assert_close(halves.server.root.A[0], table.A[0].mean(0, keepdim=True))


def test_penalties_are_of_the_tiers_before_and_a_global_head_is_trained_with_the_root_alone() -> None:
    halves = GroupedHalves("hilora", gamma_root=0.3, gamma_cluster=0.0, head="global", k_max=4).all_rounds()
    halves.personalised()
    assert {call.tier: call.how["head"] for call in halves.calls} == {"root": True, "cluster": False, "leaf": False}
    assert all(call.how["penalty"] == {"root": 0.3, "cluster": 0.0} for call in halves.calls)
    free = GroupedHalves("hilora", gamma_root=0, gamma_cluster=0).one_round()
    assert free.calls[0].how["penalty"] == {}
    for name in set(STRATEGIES) - {"hilora"}:
        for setting in ("gamma_root", "head"):
            with pytest.raises(InvalidValueError, match=f"no setting '{setting}'"):
                STRATEGIES[name](**{setting: 0.3})


def test_a_groups_mean_is_seen_by_its_members_alone() -> None:
    halves = GroupedHalves("hilora", k_max=4)
    halves.begin()
    halves.round()
    halves.begin(1)
    halves.round()
    sent = halves.server.configure(halves.stages[1], SEEN).tiers["cluster"]
    assert sent.slot.tolist() == GROUPS[SEEN].tolist()
    everywhere(halves.server.heads["cluster"].bias[0] - halves.server.heads["root"].bias[0], 2.0)  # of 0, 2, 4


def test_clients_of_unequal_ranks_hold_train_and_send_what_they_can(simulate: Simulate) -> None:
    plain = simulate("hilora", rank=4)
    unequal = simulate("hilora", rank=4, rank_budgets="1/2:4,1/2:1", out=plain.out.parent / "unequal")
    for simulation in (plain, unequal):
        simulation.run()
    held = unequal.budgets.ranks
    assert held is not None
    assert held[:5].bincount(minlength=5).tolist() in ([0, 2, 0, 0, 3], [0, 3, 0, 0, 2])
    small, large = (held == 1).nonzero().flatten(), (held == 4).nonzero().flatten()
    everyone = torch.arange(len(held))
    for tier, rows in unequal.models(everyone).tiers.items():
        assert rows.taken().rank.tolist() == held.tolist(), tier
    up, whole = unequal.post.up, plain.post.up
    seen = unequal.population.seen.tolist()
    probe = unequal.server.root.leading(torch.tensor([1])).nbytes().item()  # type: ignore[attr-defined]
    assert all(up[client] == whole[client] + probe for client in large.tolist() if client in seen)
    assert all(up[client] < whole[client] for client in small.tolist() if client in seen)
    leaf = unequal.models(everyone).tiers["leaf"].taken()
    assert leaf.B[0][small][..., 0].any()
    assert not leaf.B[0][small][..., 1:].any()
    assert not leaf.A[0][small][:, :, 1:].any()


@pytest.mark.parametrize("budgets", ["12", "6", "1/2:12,1/2:3", "1/3:12,1/3:6,1/3:2"])
@pytest.mark.parametrize(("negatives", "groups"), [(0, 1), (6, 2)])
def test_clusters_are_of_data_and_not_of_budgets(
    simulate: Simulate, double: None, budgets: str, negatives: int, groups: int
) -> None:
    """Twelve clients with images of all classes, of which some have negatives of them. In fp64: a machine's rounding
    decides in fp32 whether six steps of noise look like groups."""
    images, nothing = squares(144, 1), torch.empty(0, dtype=torch.long)
    pixels: Any = images.images
    pixels[144 - 12 * negatives :] = 255 - pixels[144 - 12 * negatives :]
    shares = torch.arange(144).view(12, 12)
    clients = tuple(Client(share, nothing, torch.arange(12), None, True) for share in shares)
    people = Population(clients, "by hand", ())
    simulation = simulate(
        rank=12, rank_budgets=budgets, rounds=[3, 1, 0], images=(images, squares(42, 2)), people=people, seed=1
    )
    simulation.backbone.model.double()
    simulation.run()
    found = simulation.clusters()
    assert found is not None
    assert found["labels"] == [int(client >= 12 - negatives) for client in range(12)]
    assert found["k"] == groups


@pytest.mark.slow
@pytest.mark.parametrize("groups", ["subspace", "kmeans"])
def test_long_training_makes_no_clusters_of_budgets(simulate: Simulate, groups: str) -> None:
    """The few ranks of some clients and the leading ones of others grow apart, where all have images of one kind. Two
    clusters are asked for, so that there is something to compare."""
    images, nothing = squares(240, 1), torch.empty(0, dtype=torch.long)
    shares = torch.arange(240).view(20, 12)
    people = Population(tuple(Client(share, nothing, torch.arange(12), None, True) for share in shares), "by hand", ())
    options: dict[str, Any] = {"rank": 12, "rank_budgets": "1/2:12,1/2:1", "lr": 1e-2, "tau_rel": 0}
    options |= {"groups": groups, "k_min": 2, "k_max": 2, "rounds": [8, 0, 0], "people": people}
    agree = []
    for seed in (4, 5, 7):
        simulation = simulate(seed=seed, images=(images, squares(42, 2)), **options)
        simulation.run()
        found = simulation.clusters()
        assert found is not None
        same = (torch.tensor(found["labels"]) == simulation.budgets.group).double().mean()
        agree.append(float(torch.maximum(same, 1 - same)))
    assert sum(agree) / 3 < 0.75, agree


def test_ranks_that_a_tier_does_not_need_go_to_the_next(simulate: Simulate) -> None:
    options: dict[str, Any] = {"rank": [4, 6, 8], "lora_alpha": [8, 12, 16], "rank_budgets": "1/2:4,1/2:2"}
    plain = simulate("hilora", **options)
    adaptive = simulate("hilora", rank_energy=0.7, out=plain.out.parent / "adaptive", **options)
    for simulation in (plain, adaptive):
        simulation.run()
    held = adaptive.budgets.ranks
    assert held is not None
    everyone = torch.arange(len(held))
    ranks = {tier: rows.taken().rank for tier, rows in adaptive.models(everyone).tiers.items()}
    needed = energy_ranks(adaptive.server.root, 0.7)  # type: ignore[attr-defined]
    assert int(needed) < 4
    assert torch.equal(ranks["root"], torch.minimum(held, needed))
    total = sum(ranks.values(), start=torch.zeros_like(held))
    assert (total <= 3 * held).all()
    (unseen,) = adaptive.population.unseen.tolist()  # its leaf is not trained, and has all that is left
    left = 3 * held - ranks["root"] - ranks["cluster"]
    assert ranks["leaf"][unseen] == left[unseen].clamp_max(8)
    assert (ranks["leaf"] <= left.clamp_max(8)).all()
    stage = adaptive.stages[1]
    trained = adaptive.server.configure(stage, everyone).tiers["cluster"].taken().rank
    assert torch.equal(trained, (2 * held - ranks["root"]).clamp_max(6))
    assert int(trained.max()) > int(held.max())  # more than an equal share
    assert plain.models(everyone).tiers["leaf"].taken().rank.tolist() == held.tolist()


def test_a_rank_energy_needs_products() -> None:
    with pytest.raises(InvalidValueError, match="rank_energy needs ranks in the order of their size"):
        STRATEGIES["hilora"](rank_energy=0.9, aggregation="factors")
