"""What the other methods average, keep and never overwrite, on clients whose training is worked out by hand: client i
adds i + 1 to all that it trains, so that the six that are seen add 3.5 on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.engine.state import State
from hilora.federated.strategies import STRATEGIES
from hilora.federated.strategies.base import Stage
from tests.federated.conftest import same
from tests.federated.strategies.by_hand import CLIENTS, RANK, SEEN, UNSEEN, ByHand, make, rounds

MEAN = 3.5
ALL = torch.arange(CLIENTS)


def one_round(method: Any, work: ByHand | None = None, clients: Tensor = SEEN) -> ByHand:
    """The first round of the first stage."""
    work = work or ByHand()
    stage: Stage = method.stages()[0]
    method.begin(stage.tier, SEEN, work)
    method.round(stage, clients, work)
    return work


def copied(state: State) -> State:
    return {name: value.clone() for name, value in state.items()}


def everywhere(value: Tensor, number: float) -> None:
    torch.testing.assert_close(value, torch.full_like(value, number))


def test_fedit_averages_the_factors_apart_by_images() -> None:
    method = make("fedit")
    A = method.root["A0"].clone()
    one_round(method, ByHand([30, 10, 10, 10, 10, 30, 10, 10]))
    mean = (30 * 1 + 10 * (2 + 3 + 4 + 5) + 30 * 6) / 100
    everywhere(method.root["B0"], mean)
    torch.testing.assert_close(method.root["A0"], A + mean)
    everywhere(method.models(UNSEEN).head.taken()["bias"], mean)


def test_flexlora_averages_products_and_gives_b_the_singular_values() -> None:
    method = make("flexlora")
    A = method.root["A0"][0].clone()
    one_round(method)
    ones = torch.ones(3, 20, RANK)
    product = sum((i + 1) * ones @ (A + i + 1) for i in range(6)) / 6
    U, sigma, Vh = torch.linalg.svd(product)
    best = U[..., :RANK] * sigma[..., None, :RANK] @ Vh[..., :RANK, :]
    B, A = method.root["B0"][0], method.root["A0"][0]
    torch.testing.assert_close(B @ A, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B.norm(dim=-2)[:, 0], sigma[:, 0])
    torch.testing.assert_close(A[:, 0].norm(dim=-1), torch.ones(3))
    everywhere(method.head["bias"], MEAN)


def test_ffa_lora_never_trains_a() -> None:
    method = make("ffa-lora")
    A = method.root["A0"].clone()
    work = one_round(method)
    assert work.calls[0].factors == "B"
    assert torch.equal(method.root["A0"], A)
    everywhere(method.root["B0"], MEAN)
    models = method.personalise(UNSEEN, work)
    assert torch.equal(models.tiers["root"].taken()["A0"][0], A[0])
    everywhere(models.tiers["root"].taken()["B0"][0], MEAN + 7)


def test_local_lora_shares_nothing() -> None:
    method = make("local-lora")
    before = copied(method.leaf)
    one_round(method)
    assert torch.equal(method.leaf["B0"][UNSEEN], before["B0"][UNSEEN])
    for client in range(6):
        everywhere(method.leaf["B0"][client], client + 1)
        everywhere(method.head["bias"][client], client + 1)
    assert len(before["A0"].flatten(1).unique(dim=0)) == CLIENTS  # each its own start


def test_fedsa_lora_averages_a_and_keeps_b_and_the_head() -> None:
    method = make("fedsa-lora")
    A = method.A["A0"].clone()
    one_round(method)
    torch.testing.assert_close(method.models(ALL).tiers["leaf"].taken()["A0"], (A + MEAN).expand(CLIENTS, -1, -1, -1))
    some = torch.tensor([0, 1])
    method.round(method.stages()[0], some, ByHand())  # the others sit this one out
    torch.testing.assert_close(method.A["A0"], A + MEAN + 1.5)
    models = method.models(ALL)
    for client, total in enumerate([2, 4, 3, 4, 5, 6, 0, 0]):
        everywhere(models.tiers["leaf"].taken()["B0"][client], total)
        everywhere(models.head.taken()["bias"][client], total)


def test_feddpa_f_copies_the_global_adapter_and_mixes_outputs() -> None:
    method = make("feddpa-f", options={"weight": 0.7, "references": 3})
    work = ByHand()
    rounds(method, work)
    assert [call.tier for call in work.calls] == ["root"] * 4 + ["leaf"]
    assert list(work.calls[-1].models.tiers) == ["leaf"]  # alone in the model
    everywhere(method.root["B0"], 4 * MEAN)
    models = method.models(SEEN)
    for client in range(6):
        everywhere(models.tiers["leaf"].taken()["B0"][client], 4 * MEAN + client + 1)
        everywhere(models.head.taken()["bias"][client], 4 * MEAN + client + 1)
    assert models.mix is not None
    assert models.mix.references is not None
    assert (models.mix.own, models.mix.shared) == ("leaf", "root")
    everywhere(models.mix.share, 0.7)
    assert models.mix.references[2].tolist() == [200, 201, 202]
    newcomers = method.models(UNSEEN)
    everywhere(newcomers.mix.share, 0)  # the global one alone
    everywhere(newcomers.head.taken()["bias"], 4 * MEAN)
    personal = method.personalise(UNSEEN, work)
    everywhere(personal.mix.share, 0.7)
    everywhere(personal.tiers["leaf"].taken()["B0"][1], 4 * MEAN + 8)
    everywhere(personal.tiers["root"].taken()["B0"][1], 4 * MEAN)


def test_feddpa_t_trains_the_local_adapter_beside_the_global_one_and_averages_only_that() -> None:
    method = make("feddpa-t")
    work = one_round(method)
    local, shared = work.calls
    assert (local.tier, shared.tier) == ("leaf", "root")
    assert local.models.mix is not None
    assert (local.models.mix.share, local.models.mix.references) == (0.5, None)
    assert list(shared.models.tiers) == ["root"]
    assert shared.models.mix is None
    everywhere(method.root["B0"], MEAN)
    everywhere(method.head["bias"], MEAN)
    method.round(method.stages()[0], torch.tensor([0]), work)
    assert not work.calls[2].models.tiers["root"].taken()["B0"].eq(0).any()  # trained beside the server's
    for client, total in enumerate([2, 2, 3, 4, 5, 6]):
        everywhere(method.leaf["B0"][client], total)
        everywhere(method.own_head["bias"][client], total)


def test_feddpa_t_predicts_with_the_global_adapter_until_a_client_has_its_own() -> None:
    method = make("feddpa-t", options={"weight": 0.9})
    work = one_round(method, clients=torch.tensor([0, 1]))
    models = method.models(ALL)
    assert models.mix is not None
    torch.testing.assert_close(models.mix.share, torch.tensor([0.9, 0.9, 0, 0, 0, 0, 0, 0]))
    assert models.head.taken()["bias"][:, 0].tolist() == [1, 2, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    assert method.personalise(UNSEEN, work).mix.share.tolist() == pytest.approx([0.9, 0.9])


def test_a_head_that_is_frozen_after_the_root_is_hiloras_alone() -> None:
    for name in STRATEGIES:
        assert make(name, head="global").run.head == ("global" if name == "hilora" else "follow")


def test_pf2lora_averages_the_common_adapter_and_keeps_the_small_one() -> None:
    method = make("pf2lora")
    assert method.run.rank["leaf"] == 2
    assert method.run.lora_alpha["leaf"] / 2 == method.run.lora_alpha["root"] / RANK
    start = copied(method.leaf)
    one_round(method)
    everywhere(method.root["B0"], MEAN)
    for client, total in enumerate([1, 2, 3, 4, 5, 6, 0, 0]):
        everywhere(method.leaf["B0"][client], total)
        everywhere(method.head["bias"][client], total)
        torch.testing.assert_close(method.leaf["A0"][client], start["A0"][client] + total)
    assert method.traffic("leaf").up == sum(value[0].numel() for value in method.root.values())


def test_fedalt_never_overwrites_a_client_and_freezes_the_mean_of_the_others() -> None:
    method = make("fedalt")
    gate = method.leaf["gate0"].clone()
    assert gate.shape == (CLIENTS, 3, 2, 20)
    one_round(method)
    rest = method.models(ALL).tiers["root"].taken()
    for client in range(6):
        everywhere(method.leaf["B0"][client], client + 1)
        everywhere(rest["B0"][client], (21 - (client + 1)) / 5)
        torch.testing.assert_close(method.leaf["gate0"][client], gate[client] + client + 1)
    everywhere(rest["B0"][6], MEAN)  # a newcomer is not among the others
    others = torch.tensor([1, 2, 3, 4, 5])
    torch.testing.assert_close(rest["A0"][0], method.leaf["A0"][others].mean(0))
    adapters, heads = method.tables()
    assert {"weight", "bias", "gate0"} == set(heads["leaf"])
    assert set(adapters) == {"root", "leaf"}


@pytest.mark.parametrize("name", ["fedsa-lora", "pf2lora", "fedalt"])
def test_heads_may_be_shared(name: str) -> None:
    alone, method = make(name), make(name, options={"shared_head": 1})
    one_round(method)
    everywhere(method.models(ALL).head.taken()["bias"], MEAN)
    method.round(method.stages()[0], torch.tensor([0, 1]), ByHand())
    everywhere(method.models(ALL).head.taken()["bias"], MEAN + 1.5)
    assert (alone.predicts_unseen, method.predicts_unseen) == (False, True)
    numbers = sum(value[0].numel() for value in method.head.values())
    more, less = method.traffic("leaf"), alone.traffic("leaf")
    assert (more.up - less.up, more.down - less.down) == (numbers, numbers)
    with pytest.raises(ValueError, match="shared_head"):
        make("local-lora", options={"shared_head": 1})


class Counted(ByHand):
    """With the numbers of images that FDLoRA's first mean weighs by."""

    class _Population:
        class _Client:
            train = torch.arange(10)

        clients = (_Client(),) * CLIENTS

    def __init__(self) -> None:
        super().__init__()
        self.population = self._Population()  # type: ignore[assignment]


def test_fdlora_starts_from_the_mean_takes_nesterov_steps_and_syncs_the_personal_adapter() -> None:
    method = make("fdlora", rounds=[1, 2, 1], options={"sync": 2, "momentum": 0.5, "outer_lr": 0.5})
    work = Counted()
    rounds(method, work, 1)
    method.phase = 0
    one, two, three = method.stages()
    assert [stage.rounds for stage in (one, two, three)] == [1, 2, 1]
    method.phase = 1
    method.begin(two.tier, SEEN, work)
    everywhere(method.shared["adapters"]["B0"], MEAN)  # the mean of the personal ones
    method.round(two, SEEN, work)
    assert work.calls[-1].epochs == 3
    # The mean change is 3.5 up: slope -3.5, velocity -3.5, and Nesterov's step 0.5 · (3.5 + 0.5 · 3.5).
    everywhere(method.shared["adapters"]["B0"], MEAN + 0.5 * 1.5 * MEAN)
    everywhere(method.leaf["B0"][2], 3)  # not overwritten yet
    before = method.shared["adapters"]["B0"][0].clone()
    method.round(two, SEEN, work)
    torch.testing.assert_close(method.leaf["B0"][2], before + 3)  # the second round: what it trained of the shared one
    velocity = MEAN + 0.5 * MEAN
    torch.testing.assert_close(method.shared["adapters"]["B0"][0], before + 0.5 * (MEAN + 0.5 * velocity))


def test_fdlora_fuses_with_the_weights_of_the_lowest_loss() -> None:
    method = make("fdlora", rounds=[1, 2, 1], options={"l1": 0.0, "evaluations": 60})
    work = Counted()
    rounds(method, work)
    bias = method.models(SEEN).head.taken()["bias"].mean(1)
    assert (bias - SEEN).abs().max() < 0.2  # the loss that `ByHand` gives is how far this is from the client's number
    w = method.weights[SEEN]
    fused = method.models(SEEN).tiers["leaf"].taken()["A0"]
    wide = w.view(6, 2, 1, 1, 1)
    expected = wide[:, 0] * method.leaf["A0"][SEEN] + wide[:, 1] * method.shared["adapters"]["A0"]
    torch.testing.assert_close(fused, expected)
    heavy = make("fdlora", rounds=[1, 2, 1], options={"l1": 100.0, "evaluations": 60})
    rounds(heavy, Counted())
    assert heavy.weights[SEEN].abs().sum() < w.abs().sum() / 4


def test_ifca_clients_take_the_adapter_of_the_lowest_loss() -> None:
    method = make("ifca", options={"k": 2})
    work, stage = ByHand(), method.stages()[0]
    assert not same({"bias": method.head["bias"][0]}, {"bias": method.head["bias"][1]})  # or all would choose alike
    method.head = {name: torch.zeros_like(value) for name, value in method.head.items()}
    method.begin("root", SEEN, work)
    assert method.member[SEEN].unique().tolist() == [0]
    method.member[SEEN] = torch.tensor([0, 1, 0, 1, 0, 1])
    method.round(stage, SEEN, work)
    everywhere(method.root["B0"][0], (1 + 3 + 5) / 3)
    everywhere(method.root["B0"][1], (2 + 4 + 6) / 3)
    # The biases are now 3 and 4, and the loss of client i is their distance from i: all below 3.5 take the first.
    assert method.member[SEEN].tolist() == [0, 0, 0, 0, 1, 1]
    method.admit(UNSEEN, ByHand())
    assert method.member[UNSEEN].tolist() == [1, 1]
    assert method.traffic("root").down == 2 * method.traffic("root").up


def test_central_training_pools_the_images() -> None:
    method = make("central")
    work = one_round(method)
    assert work.calls[0].pooled
    everywhere(method.root["B0"], 1)
    assert method.traffic("root") == (0, 0)


def test_head_only_trains_no_adapter_and_passes_the_head_down() -> None:
    method = make("head-only", rounds=[1, 1, 1], groups="true")
    work = ByHand()
    rounds(method, work)
    assert {call.factors for call in work.calls} == {""}
    assert not method.models(SEEN).tiers["root"].taken()["B0"].any()
    everywhere(method.heads["root"]["bias"], MEAN)
    everywhere(method.heads["cluster"]["bias"][0], MEAN + (1 + 3 + 5) / 3)
    everywhere(method.heads["leaf"]["bias"][5], MEAN + (2 + 4 + 6) / 3 + 6)
    head = method.heads["root"]["weight"].numel() + method.heads["root"]["bias"].numel()
    assert [method.traffic(tier).up for tier in ("root", "cluster", "leaf")] == [head, head, 0]
    method.admit(UNSEEN, work)
    method.personalise(UNSEEN, work)
    assert {call.factors for call in work.calls} == {""}  # probes, too


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_state_goes_through_a_checkpoint(name: str) -> None:
    method, other = make(name), make(name)
    one_round(method, Counted())
    other.load_state_dict(method.state_dict())
    a, b = (one.models(SEEN) for one in (method, other))
    for tier in a.tiers:
        assert same(b.tiers[tier].taken(), a.tiers[tier].taken())
    assert same(b.head.taken(), a.head.taken())
    with pytest.raises(ValueError, match="not a state of"):
        other.load_state_dict({"foreign": 1})


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_all_rounds_are_used(name: str) -> None:
    assert sum(stage.rounds for stage in make(name).stages()) == 5
