"""Messages, and what they weigh."""

from __future__ import annotations

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.engine.post import Post
from hilora.federated.protocol import Download, Head, Rows, Stage, Upload, own, shared
from tests.federated.conftest import same

STAGE = Stage("root", 1, "root")
CLIENTS = torch.arange(3)


def table(slots: int, rank: list[int] | None = None, value: float = 1.0) -> AdapterTable:
    """Adapters of rank 4 for three projections 5 → 7 and two 6 → 6."""
    A = [torch.ones(slots, 3, 4, 5) * value, torch.ones(slots, 2, 4, 6) * value]
    B = [torch.ones(slots, 3, 7, 4) * value, torch.ones(slots, 2, 6, 4) * value]
    return AdapterTable(A, B, None if rank is None else torch.tensor(rank))


A, B = 4 * (3 * 5 + 2 * 6), 4 * (3 * 7 + 2 * 6)  # bytes of each rank
HEAD = 4 * (2 * 9 + 2)


def heads(slots: int) -> Head:
    return Head(torch.zeros(slots, 2, 9), torch.zeros(slots, 2))


def test_a_download_weighs_what_each_client_gets() -> None:
    member = torch.tensor([1, -1, 0])
    found = Download(
        STAGE, {"root": shared(table(1), CLIENTS), "cluster": Rows(table(2), member)}, shared(heads(1), CLIENTS)
    )
    one = 4 * (A + B)
    assert found.nbytes().tolist() == [2 * one + HEAD, one + HEAD, 2 * one + HEAD]
    assert found.of(torch.tensor([1])).nbytes().tolist() == [one + HEAD]
    assert [part.name for part in found.parts()] == ["root.A.0", "root.B.0", "cluster.A.0", "cluster.B.0", "head.0"]
    assert not Download(STAGE).nbytes().any()


def test_several_rows_for_each_client_are_all_sent() -> None:
    everything = torch.arange(2).expand(3, -1)
    found = Download(STAGE, {"root": Rows(table(2), everything)}, Rows(heads(2), everything))
    assert found.nbytes().tolist() == [2 * (4 * (A + B) + HEAD)] * 3
    picked = found.tiers["root"].picked(torch.tensor([1, 0, 1]))
    assert picked.slot.tolist() == [1, 0, 1]


def test_only_the_ranks_in_use_weigh_anything() -> None:
    unequal = table(3, [4, 1, 2])
    assert unequal.nbytes().tolist() == [4 * (A + B), A + B, 2 * (A + B)]
    assert unequal.only("A").nbytes().tolist() == [4 * A, A, 2 * A]
    assert Download(STAGE, {"leaf": own(unequal)}).nbytes().tolist() == unequal.nbytes().tolist()
    upload = Upload(CLIENTS, torch.ones(3), {"leaf": unequal}, heads(3), torch.zeros(3, dtype=torch.long))
    assert upload.nbytes().tolist() == [4 * (A + B) + HEAD + 8, A + B + HEAD + 8, 2 * (A + B) + HEAD + 8]
    assert table(1, [3]).each(lambda tensor: tensor.half()).nbytes().tolist() == [3 * (A + B) // 2]


def test_some_of_the_messages_are_those_of_some_clients() -> None:
    upload = Upload(CLIENTS + 4, torch.tensor([1, 2, 3]), {"leaf": table(3, [4, 1, 2])}, heads(3), CLIENTS)
    for index in (torch.tensor([2, 0]), torch.tensor([True, False, True])):
        some = upload.rows(index)
        assert sorted(some.clients.tolist()) == [4, 6]
        assert some.tiers["leaf"].rank.tolist() == upload.tiers["leaf"].rank[index].tolist()
        assert len(some.head or ()) == 2
        assert some.choice is not None
    empty = Upload(CLIENTS, torch.ones(3)).rows(CLIENTS[:0])
    assert empty.nbytes().tolist() == []


def test_a_client_is_not_sent_again_what_it_holds() -> None:
    post = Post(5)
    clients = torch.tensor([1, 3])

    def send(A_value: float, B_value: float, who: torch.Tensor = clients) -> list[int]:
        before = post.down.clone()
        mixed = table(1, value=A_value).joined(table(1, value=B_value).only("B"))
        post.send(who, Download(STAGE, {"root": shared(mixed, who)}, shared(heads(1), who)))
        return (post.down - before).tolist()

    assert send(1, 1) == [0, 4 * (A + B) + HEAD, 0, 4 * (A + B) + HEAD, 0]
    assert send(1, 1) == [0] * 5
    assert send(1, 2) == [0, 4 * B, 0, 4 * B, 0]
    assert send(1, 2, torch.tensor([3, 4])) == [0, 0, 0, 0, 4 * (A + B) + HEAD]  # new to this one alone
    assert send(1, 1) == [0, 4 * B, 0, 4 * B, 0]  # it keeps the last one only
    post.receive(Upload(clients, torch.ones(2), {"root": table(2, [4, 2])}))
    assert post.up.tolist() == [0, 4 * (A + B), 0, 2 * (A + B), 0]


def test_the_rank_is_part_of_what_a_client_holds() -> None:
    """Of two adapters of the same numbers but other ranks, the second is sent."""
    post, one = Post(1), torch.tensor([0])
    for rank, moved in ((4, 4), (2, 4 + 2)):
        post.send(one, Download(STAGE, {"root": shared(table(1, [rank]), one)}))
        assert post.down.tolist() == [moved * (A + B)]


def test_what_is_held_survives_a_checkpoint() -> None:
    post, other, who = Post(3), Post(3), CLIENTS
    download = Download(STAGE, {"root": shared(table(1), who)})
    post.send(who, download)
    other.load_state_dict(post.state_dict())
    for one in (post, other):
        one.send(who, download)
        assert one.down.tolist() == [4 * (A + B)] * 3


def test_rows_of_clients() -> None:
    stack = table(3, [4, 1, 2])
    rows = Rows(stack, torch.tensor([2, 0, 1]))
    assert rows.of(torch.tensor([0, 2])).slot.tolist() == [2, 1]
    assert rows.taken().rank.tolist() == [2, 4, 1]
    assert same(own(stack).taken(), stack)
    with pytest.raises(InvalidValueError, match="rank"):
        table(2, [5, 1])
