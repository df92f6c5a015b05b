"""What methods average, keep and never overwrite, on clients whose training is worked out by hand: client i adds i + 1
to all that it trains, so that the six that are seen add 3.5 on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hilora.adapters.composition import Weights
from hilora.adapters.table import Values
from hilora.errors import InvalidValueError
from hilora.federated.local.bilevel import Bilevel
from hilora.federated.strategies import STRATEGIES
from hilora.federated.strategies.feddpa import NearnessMix
from tests.federated.conftest import copied, same
from tests.federated.strategies.by_hand import ALL, CLIENTS, RANK, SEEN, UNSEEN, Halves, each, everywhere

MEAN = 3.5
SOME = torch.tensor([0, 1])


def test_fedit_averages_the_factors_apart_by_images() -> None:
    halves = Halves("fedit", [30, 10, 10, 10, 10, 30, 10, 10])
    A = halves.server.root.A[0].clone()
    halves.one_round()
    mean = (30 * 1 + 10 * (2 + 3 + 4 + 5) + 30 * 6) / 100
    everywhere(halves.server.root.B[0], mean)
    torch.testing.assert_close(halves.server.root.A[0], A + mean)
    everywhere(halves.bias(UNSEEN), mean)


def test_flexlora_averages_products_and_gives_b_the_singular_values() -> None:
    halves = Halves("flexlora")
    A = halves.server.root.A[0][0].clone()
    halves.one_round()
    ones = torch.ones(3, 20, RANK)
    product = sum((i + 1) * ones @ (A + i + 1) for i in range(6)) / 6
    U, sigma, Vh = torch.linalg.svd(product)
    best = U[..., :RANK] * sigma[..., None, :RANK] @ Vh[..., :RANK, :]
    ((A, B),) = ((A[0], B[0]) for A, B in halves.server.root.factors)
    torch.testing.assert_close(B @ A, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(B.norm(dim=-2)[:, 0], sigma[:, 0])
    torch.testing.assert_close(A[:, 0].norm(dim=-1), torch.ones(3))
    everywhere(halves.server.head.bias, MEAN)


def test_ffa_lora_never_trains_a() -> None:
    halves = Halves("ffa-lora")
    A = halves.server.root.A[0].clone()
    halves.one_round()
    assert halves.calls[0].how["factors"] == "B"
    assert torch.equal(halves.server.root.A[0], A)
    everywhere(halves.server.root.B[0], MEAN)
    trained = halves.personalised().tiers["root"].taken()
    assert torch.equal(trained.A[0][0], A[0])
    everywhere(trained.B[0][0], MEAN + 7)


def test_local_lora_shares_nothing() -> None:
    halves = Halves("local-lora")
    start = halves.models(ALL).tiers["leaf"].taken()
    halves.one_round()
    each(halves.B("leaf"), [1, 2, 3, 4, 5, 6, 0, 0])
    each(halves.bias(), [1, 2, 3, 4, 5, 6, 0, 0])
    assert len(start.A[0].flatten(1).unique(dim=0)) == CLIENTS  # each its own start


def test_fedsa_lora_averages_a_and_keeps_b_and_the_head() -> None:
    halves = Halves("fedsa-lora")
    A = halves.server.common.A[0].clone()
    halves.one_round()
    torch.testing.assert_close(halves.models(ALL).tiers["leaf"].taken().A[0], (A + MEAN).expand(CLIENTS, -1, -1, -1))
    halves.round(SOME)  # the others sit this one out
    torch.testing.assert_close(halves.server.common.A[0], A + MEAN + 1.5)
    each(halves.B("leaf"), [2, 4, 3, 4, 5, 6, 0, 0])
    each(halves.bias(), [2, 4, 3, 4, 5, 6, 0, 0])


def test_fedsa_lora_mirrored_averages_b_and_keeps_a() -> None:
    halves = Halves("fedsa-lora", shared_factor="B")
    A = halves.models(ALL).tiers["leaf"].taken().A[0]
    assert len(A.flatten(1).unique(dim=0)) == 1  # the start is common
    everywhere(halves.server.common.B[0], 0)
    halves.one_round()
    everywhere(halves.B("leaf"), MEAN)
    each(halves.models(ALL).tiers["leaf"].taken().A[0] - A, [1, 2, 3, 4, 5, 6, 0, 0])
    halves.round(SOME)
    everywhere(halves.B("leaf"), MEAN + 1.5)
    each(halves.models(ALL).tiers["leaf"].taken().A[0] - A, [2, 4, 3, 4, 5, 6, 0, 0])
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN))
    assert (upload.tiers["leaf"].A, halves.kept("leaf").B) == ((), ())


def test_feddpa_f_copies_the_global_adapter_and_mixes_outputs() -> None:
    halves = Halves("feddpa-f", weight=0.7, references=3).all_rounds()
    assert [call.tier for call in halves.calls] == ["root"] * 4 + ["leaf"]
    assert list(halves.calls[-1].models.tiers) == ["leaf"]  # alone in the model
    everywhere(halves.server.root.B[0], 4 * MEAN)
    each(halves.B("leaf", SEEN), [4 * MEAN + i + 1 for i in range(6)])
    each(halves.bias(SEEN), [4 * MEAN + i + 1 for i in range(6)])
    mix = halves.models(SEEN).composition
    assert isinstance(mix, NearnessMix)
    everywhere(mix.share, 0.7)
    assert mix.references[2].tolist() == [200, 201, 202]
    newcomers = halves.models(UNSEEN)
    assert isinstance(newcomers.composition, NearnessMix)
    everywhere(newcomers.composition.share, 0)  # the global one alone
    everywhere(newcomers.head.taken().bias, 4 * MEAN)
    personal = halves.personalised()
    assert isinstance(personal.composition, NearnessMix)
    everywhere(personal.composition.share, 0.7)
    everywhere(personal.tiers["leaf"].taken().B[0][1], 4 * MEAN + 8)
    everywhere(personal.tiers["root"].taken().B[0][1], 4 * MEAN)


def test_feddpa_t_trains_the_local_adapter_beside_the_global_one_and_averages_only_that() -> None:
    halves = Halves("feddpa-t").one_round()
    local, shared = halves.calls
    assert (local.tier, shared.tier) == ("leaf", "root")
    assert isinstance(local.models.composition, Weights)
    assert local.models.composition.weights == {"leaf": 0.5, "root": 0.5}
    assert list(shared.models.tiers) == ["root"]
    assert shared.models.composition is None
    everywhere(halves.server.root.B[0], MEAN)
    everywhere(halves.server.head.bias, MEAN)
    halves.round(torch.tensor([0]))
    everywhere(halves.calls[2].models.tiers["root"].taken().B[0], MEAN)  # trained beside the server's
    each(halves.B("leaf", SEEN), [2, 2, 3, 4, 5, 6])
    each(halves.kept("head").bias[SEEN], [2, 2, 3, 4, 5, 6])


def test_feddpa_t_predicts_with_the_global_adapter_until_a_client_has_its_own() -> None:
    halves = Halves("feddpa-t", weight=0.9).one_round(SOME)
    models = halves.models(ALL)
    assert isinstance(models.composition, NearnessMix)
    torch.testing.assert_close(models.composition.share, torch.tensor([0.9, 0.9, 0, 0, 0, 0, 0, 0]))
    assert models.head.taken().bias[:, 0].tolist() == [1, 2, 1.5, 1.5, 1.5, 1.5, 1.5, 1.5]
    trained = halves.personalised().composition
    assert isinstance(trained, NearnessMix)
    assert trained.share.tolist() == pytest.approx([0.9, 0.9])


def test_pf2lora_averages_the_common_adapter_and_keeps_the_small_one() -> None:
    halves = Halves("pf2lora", rank=4, lora_alpha=16, own_rank=2, alpha=0.3)
    config = halves.server.adapters(halves.server.training)
    assert (config.rank("root"), config.rank("leaf")) == (4, 2)
    assert config.scale("leaf") == config.scale("root") == 4
    start = halves.models(ALL).tiers["leaf"].taken()
    halves.one_round()
    assert halves.calls[0].how["algorithm"] == Bilevel("leaf", 0.3)
    everywhere(halves.server.root.B[0], MEAN)
    totals = [1.0, 2, 3, 4, 5, 6, 0, 0]
    each(halves.B("leaf"), totals)
    each(halves.bias(), totals)
    each(halves.models(ALL).tiers["leaf"].taken().A[0] - start.A[0], totals)


def test_fedalt_never_overwrites_a_client_and_freezes_the_mean_of_the_others() -> None:
    halves = Halves("fedalt")
    first = halves.models(ALL).composition
    assert first is not None
    (gate,) = first.tensors().values()
    assert gate.shape == (CLIENTS, 3, 2, 20)
    halves.one_round()
    models = halves.models(ALL)
    rest, leaf = models.tiers["root"].taken(), models.tiers["leaf"].taken()
    each(leaf.B[0], [1, 2, 3, 4, 5, 6, 0, 0])
    each(rest.B[0], [*((21 - (i + 1)) / 5 for i in range(6)), MEAN, MEAN])  # a newcomer is not among the others
    assert models.composition is not None
    (trained,) = models.composition.tensors().values()
    each(trained - gate, [1, 2, 3, 4, 5, 6, 0, 0])
    torch.testing.assert_close(rest.A[0][0], leaf.A[0][1:6].mean(0))
    adapters, heads = halves.server.tables(models)
    assert set(heads["leaf"]) == {"weight", "bias", "gate.0"}
    assert set(adapters) == {"root", "leaf"}


@pytest.mark.parametrize("name", ["fedsa-lora", "pf2lora", "fedalt", "fedopal", "sdflora"])
def test_heads_may_be_shared(name: str) -> None:
    alone, halves = Halves(name), Halves(name, shared_head=True)
    upload = {one: one.ask(SEEN, one.server.configure(one.stage, SEEN)) for one in (alone, halves)}
    assert (upload[alone].head is None, upload[halves].head is None) == (True, False)
    halves = Halves(name, shared_head=True).one_round()
    everywhere(halves.bias(), MEAN)
    halves.round(SOME)
    everywhere(halves.bias(), MEAN + 1.5)
    assert "head" not in halves.store.tables
    assert (alone.server.predicts_unseen, halves.server.predicts_unseen) == (False, True)
    with pytest.raises(InvalidValueError, match="no setting 'shared_head'"):
        STRATEGIES["local-lora"](shared_head=True)


def test_fdlora_starts_from_the_mean_takes_nesterov_steps_and_syncs_the_personal_adapter() -> None:
    halves = Halves("fdlora", rounds=[1, 2, 1], sync=2, momentum=0.5, outer_lr=0.5)
    halves.one_round()
    assert [stage.rounds for stage in halves.stages] == [1, 2, 1]
    halves.begin(1)
    everywhere(halves.server.root.B[0], MEAN)  # the mean of the personal ones
    halves.round()
    assert halves.calls[-1].how["epochs"] == 3
    # The mean change is 3.5 up: slope -3.5, velocity -3.5, and Nesterov's step 0.5 · (3.5 + 0.5 · 3.5).
    everywhere(halves.server.root.B[0], MEAN + 0.5 * 1.5 * MEAN)
    everywhere(halves.kept("leaf").B[0][2], 3)  # not overwritten yet
    before = halves.server.root.B[0][0].clone()
    halves.round()
    torch.testing.assert_close(halves.kept("leaf").B[0][2], before + 3)  # what it trained of the shared one
    velocity = MEAN + 0.5 * MEAN
    torch.testing.assert_close(halves.server.root.B[0][0], before + 0.5 * (MEAN + 0.5 * velocity))


def test_fdlora_fuses_with_the_weights_of_the_lowest_loss() -> None:
    halves = Halves("fdlora", rounds=[1, 2, 1], l1=0.0, evaluations=60).all_rounds()
    bias = halves.bias(SEEN).mean(1)
    assert (bias - SEEN).abs().max() < 0.2  # the loss that `ByHand` gives is how far this is from the client's number
    w = halves.kept("weights")["fusion"][SEEN]
    wide = w.view(6, 2, 1, 1, 1)
    expected = wide[:, 0] * halves.kept("leaf").A[0][SEEN] + wide[:, 1] * halves.server.root.A[0]
    torch.testing.assert_close(halves.models(SEEN).tiers["leaf"].taken().A[0], expected)
    heavy = Halves("fdlora", rounds=[1, 2, 1], l1=100.0, evaluations=60).all_rounds()
    assert heavy.kept("weights")["fusion"][SEEN].abs().sum() < w.abs().sum() / 4


def test_ifca_clients_take_the_adapter_of_the_lowest_loss() -> None:
    halves = Halves("ifca", k=2)
    assert not torch.equal(*halves.server.head.bias)  # or all would choose alike
    halves.server.head = halves.server.head.each(torch.zeros_like)
    chosen = Values(choice=torch.tensor([0, 1, 0, 1, 0, 1]), round=torch.full((6,), 1))
    halves.store.of(SEEN).put("choice", chosen)  # as if the losses had said so in round 1
    halves.one_round()
    each(halves.server.root.B[0], [(1 + 3 + 5) / 3, (2 + 4 + 6) / 3])
    # The biases are now 3 and 4, and the loss of client i is their distance from i: all below 3.5 take the first.
    assert halves.models(SEEN).cluster.tolist() == [0, 0, 0, 0, 1, 1]  # type: ignore[union-attr]
    assert halves.models(UNSEEN).cluster.tolist() == [1, 1]  # type: ignore[union-attr]
    each(halves.B("root", SEEN), [3, 3, 3, 3, 4, 4])


def test_central_training_pools_the_images() -> None:
    halves = Halves("central").one_round()
    assert halves.calls[0].how["pooled"]
    everywhere(halves.server.root.B[0], 1)
    assert not halves.server.travels


def test_head_only_trains_no_adapter_and_passes_the_head_down() -> None:
    halves = Halves("head-only", rounds=[1, 1, 1], groups="true", k_max=4).all_rounds()
    assert {call.how["factors"] for call in halves.calls} == {""}
    assert not halves.B("root", SEEN).any()
    heads = halves.server.heads
    everywhere(heads["root"].bias, MEAN)
    everywhere(heads["cluster"].bias[0], MEAN + (1 + 3 + 5) / 3)
    everywhere(halves.bias(SEEN)[5], MEAN + (2 + 4 + 6) / 3 + 6)
    assert set(heads) == {"root", "cluster"}
    halves.admit()
    halves.personalised()
    assert {call.how["factors"] for call in halves.calls} == {""}  # probes, too


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_state_goes_through_a_checkpoint(name: str) -> None:
    halves, other = Halves(name), Halves(name)
    halves.one_round()
    other.server.load_state_dict(halves.server.state_dict())
    other.store.load_state_dict(halves.store.state_dict())
    other.done = halves.done
    a, b = (one.models(SEEN) for one in (halves, other))
    for tier in a.tiers:
        assert same(b.tiers[tier].taken(), a.tiers[tier].taken())
    assert same(b.head.taken(), a.head.taken())


def test_what_a_strategy_sets_is_its_state_and_going_back_forgets_what_came_later() -> None:
    halves = Halves("fedit")
    before = halves.server.state_dict()
    assert set(before) == {"root", "head"}
    halves.server.noted = torch.ones(2)
    assert "noted" in halves.server.state_dict()
    halves.server.load_state_dict(before)
    assert set(halves.server.state_dict()) == {"root", "head"}


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_all_rounds_are_used(name: str) -> None:
    assert sum(stage.rounds for stage in Halves(name).stages) == 5


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_a_round_without_images_changes_nothing_that_is_shared(name: str) -> None:
    halves = Halves(name, [0] * CLIENTS)
    before = {key: copied(value) for key, value in _stacks(halves).items()}
    upload = halves.ask(SEEN, halves.server.configure(halves.stage, SEEN).at(1))
    halves.server.aggregate(halves.stage, upload)
    for key, value in _stacks(halves).items():
        assert same(value, before[key]), key


def _stacks(halves: Halves) -> dict[str, Any]:
    return {key: value for key, value in halves.server.state_dict().items() if key in ("root", "head", "common")}
