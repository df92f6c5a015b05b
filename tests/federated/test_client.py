"""What clients keep for themselves."""

from __future__ import annotations

import torch

from hilora.adapters.composition import Weights
from hilora.adapters.table import AdapterTable, Values
from hilora.federated.client import ClientStore, Models, Trained
from hilora.federated.protocol import Head, Rows, own, shared
from tests.federated.conftest import same

SOME = torch.tensor([3, 1])


def numbers(*values: float) -> Values:
    return Values(number=torch.tensor(values))


def test_a_client_reads_what_it_wrote_and_no_other_does() -> None:
    store = ClientStore(5)
    state = store.of(SOME)
    assert state.has("number").tolist() == [False, False]
    state.put("number", numbers(30, 10))
    assert state.rows("number").taken()["number"].tolist() == [30, 10]
    assert store.of(torch.arange(5)).has("number").tolist() == [False, True, False, True, False]
    assert store.tables["number"].tensors()["number"].tolist() == [0, 10, 0, 30, 0]


def test_only_those_that_a_mask_names_write() -> None:
    store = ClientStore(5)
    store.of(SOME).put("number", numbers(30, 10), torch.tensor([False, True]))
    assert store.of(SOME).has("number").tolist() == [False, True]
    assert store.tables["number"].tensors()["number"].tolist() == [0, 10, 0, 0, 0]


def test_those_that_have_nothing_get_what_is_made_and_the_others_keep_theirs() -> None:
    store = ClientStore(5)
    store.of(SOME[:1]).put("number", numbers(30))
    found = store.of(SOME).filled("number", lambda: numbers(-1, -2)).taken()
    assert found["number"].tolist() == [30, -2]

    def never() -> Values:
        raise AssertionError("all have a row")

    assert store.of(SOME).filled("number", never).taken()["number"].tolist() == [30, -2]


def test_what_is_put_is_a_copy_and_ranks_stay_with_their_rows() -> None:
    store = ClientStore(4)
    table = AdapterTable([torch.ones(2, 1, 3, 4)], [torch.ones(2, 1, 5, 3)], torch.tensor([3, 1]))
    store.of(SOME).put("leaf", table)
    table.A[0].zero_()
    kept = store.of(SOME).rows("leaf").taken()
    assert kept.rank.tolist() == [3, 1]
    assert kept.A[0].all()


def test_the_store_goes_through_a_checkpoint() -> None:
    store, other = ClientStore(5), ClientStore(5)
    store.of(SOME).put("number", numbers(30, 10))
    other.load_state_dict(store.state_dict())
    assert other.of(SOME).rows("number").taken()["number"].tolist() == [30, 10]
    assert other.of(torch.arange(5)).has("number").tolist() == [False, True, False, True, False]


def test_models_of_some_clients_and_after_a_training() -> None:
    leaf = AdapterTable([torch.randn(3, 1, 2, 4)], [torch.randn(3, 1, 5, 2)])
    head, everyone = Head(torch.randn(1, 2, 9), torch.zeros(1, 2)), torch.arange(3)
    weights = Weights({"leaf": torch.tensor([0.1, 0.2, 0.3]), "root": 0.5})
    models = Models({"leaf": own(leaf)}, shared(head, everyone), weights, torch.tensor([0, 1, 0]))
    some = models.of(torch.tensor([2, 0]))
    assert same(some.tiers["leaf"].taken(), leaf.rows(torch.tensor([2, 0])))
    assert isinstance(some.composition, Weights)
    torch.testing.assert_close(some.composition.weights["leaf"], torch.tensor([0.3, 0.1]))
    assert some.composition.weights["root"] == 0.5
    assert some.cluster is not None
    assert some.cluster.tolist() == [0, 0]
    new = AdapterTable([torch.zeros(3, 1, 2, 4)], [torch.zeros(3, 1, 5, 2)])
    trained = Trained(everyone, {"root": new}, head.repeated(3), None, torch.ones(3), torch.ones(3))
    after = models.after(trained)
    assert set(after.tiers) == {"leaf", "root"}
    assert after.composition is weights
    assert isinstance(after.tiers["leaf"], Rows)


def test_an_upload_has_what_was_asked_for() -> None:
    table = AdapterTable([torch.ones(2, 1, 2, 4)], [torch.ones(2, 1, 5, 2)])
    heads = Head(torch.ones(2, 2, 9), torch.ones(2, 2))
    trained = Trained(SOME, {"root": table, "leaf": table}, heads, None, torch.tensor([5, 7]), torch.ones(2))
    whole, part, nothing = (
        trained.upload("root"),
        trained.upload("leaf", factors="A", head=False),
        trained.upload(head=False),
    )
    assert (list(whole.tiers), whole.head) == (["root"], heads)
    assert (part.tiers["leaf"].B, part.head) == ((), None)
    assert len(part.tiers["leaf"].A) == 1
    assert (dict(nothing.tiers), nothing.head, nothing.choice) == ({}, None, None)
    assert nothing.clients.tolist() == [3, 1]
    assert nothing.images.tolist() == [5, 7]


def test_an_update_is_finite_in_all_that_was_trained() -> None:
    def finite(which: str) -> list[bool]:
        tensors = {"adapter": torch.ones(2, 1, 2, 4), "head": torch.ones(2, 2, 9), "weights": torch.ones(2)}
        tensors[which][1] = torch.nan
        table = AdapterTable([tensors["adapter"]], [torch.ones(2, 1, 5, 2)])
        heads, weights = Head(tensors["head"], torch.ones(2, 2)), Weights({"leaf": tensors["weights"]})
        return Trained(SOME, {"leaf": table}, heads, weights, torch.ones(2), torch.ones(2)).finite().tolist()

    assert finite("adapter") == finite("head") == finite("weights") == [True, False]
