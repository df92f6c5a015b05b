"""Secure aggregation by Flower's own protocol, over a grid without a network: the mean is right, also when clients drop
out, and nothing of a client's is in what the server gets."""

from __future__ import annotations

import copy
import io
import itertools
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.deploy.secure import (
    SecureAggregationError,
    is_secured,
    mean_upload,
    secure_mean,
    secured,
    vector,
)
from hilora.federated.protocol import Download, Rows, Upload, shared
from hilora.federated.reception import Reception
from tests.federated.conftest import same
from tests.federated.strategies.by_hand import SEEN, Halves
from tests.federated.test_privacy import GROUP, GROUPED, SENT, STAGE, flat, sent
from tests.federated.test_vetting import EXPECTED, head, table

Work = Callable[[bytes], Sequence[Tensor]]


class Node:
    """A SuperNode whose app drops out at the message of a number, if one is given."""

    def __init__(self, number: int, work: Work, drops: int | None = None) -> None:
        self.context = Context(1, number, {}, RecordDict(), {})
        self.app, self.drops, self.count = ClientApp(), drops, 0

        def train(message: Message, context: Context) -> Message:
            assert is_secured(message)
            return secured(message, context, work)

        self.app.train()(train)

    def answer(self, message: Message) -> Message:
        self.count += 1
        if self.drops is not None and self.count >= self.drops:
            return Message(Error(2, "gone"), reply_to=message)
        return self.app(message, self.context)


class Grid:
    """What the protocol uses of Flower's grid; remembers all replies."""

    def __init__(self, nodes: dict[int, Node]) -> None:
        self.nodes, self.numbers, self.replies = nodes, itertools.count(1), list[Message]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        found = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self.numbers))
            found.append(self.nodes[message.metadata.dst_node_id].answer(copy.deepcopy(message)))
        self.replies += found
        return found


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flower's processes know whose they are."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def numbers(node: int) -> list[Tensor]:
    return [torch.full((3, 2), node / 10), torch.tensor([float(node), -1.0, 1e9])]


def run(drops: dict[int, int], clients: int = 5, bound: float = 8.0) -> tuple[Any, Grid, list[tuple[int, bytes]]]:
    """A mean over nodes 1, 2, …, some of which drop out."""
    asked: list[tuple[int, bytes]] = []

    def work(node: int) -> Work:
        return lambda order: asked.append((node, order)) or numbers(node)  # type: ignore[func-returns-value]

    nodes = {node: Node(node, work(node), drops.get(node)) for node in range(1, clients + 1)}
    grid = Grid(nodes)
    orders = {node: f"order for {node}".encode() for node in nodes}
    return secure_mean(grid, orders, bound), grid, asked


def expected_mean(nodes: list[int], bound: float = 8.0) -> list[np.ndarray[Any, Any]]:
    cut = [[tensor.clamp(-bound, bound) for tensor in numbers(node)] for node in nodes]
    return [torch.stack(found).double().mean(0).numpy() for found in zip(*cut, strict=True)]


@pytest.mark.parametrize("drops", [{}, {2: 3}, {2: 3, 5: 3}, {4: 4}, {1: 2}, {1: 1}, {1: 2, 3: 3}])
def test_the_mean_is_that_of_the_clients_that_stayed(drops: dict[int, int]) -> None:
    """Some drop out before they send keys (1), shares of them (2), a vector (3), or what takes masks away (4)."""
    mean, _, asked = run(drops)
    stayed = [node for node in range(1, 6) if drops.get(node, 9) > 3]
    assert mean.nodes == stayed
    for found, right in zip(mean.arrays, expected_mean(stayed), strict=True):
        np.testing.assert_allclose(found, right, rtol=0, atol=2 * 8.0 / 2**22)
    assert set(asked) == {(node, f"order for {node}".encode()) for node in stayed}


def test_too_few_clients_and_too_many_that_drop_out_are_errors() -> None:
    with pytest.raises(InvalidValueError, match=r"a sum over 2 clients keeps no secret: expected at least 3"):
        run({}, clients=2)
    with pytest.raises(SecureAggregationError, match="secure aggregation of 5 clients failed"):
        run({1: 3, 2: 3, 3: 3})
    with pytest.raises(SecureAggregationError, match="fewer than 3 stayed to its end"):
        run({1: 3}, clients=3)


def test_the_server_gets_nothing_of_a_client() -> None:
    """What a client sends is as random as its masks: none of its numbers is in it, and twice the same is not alike."""
    (_, grid, _), (_, again, _) = run({}), run({})
    for node, other in zip(grid.replies, again.replies, strict=True):
        assert not any(len(record) for record in node.content.array_records.values())
        for record in node.content.metric_records.values():
            assert dict(record) == {"num_examples": 1}
        assert node.content != other.content or not node.content.config_records
    masked = [
        np.concatenate([np.load(io.BytesIO(data)).ravel() for data in cast(list[bytes], values)[1:]])
        for reply in grid.replies
        for record in reply.content.config_records.values()
        for name, values in record.items()
        if "masked" in name
    ]
    assert len(masked) == 5
    assert len(np.unique(np.concatenate(masked))) == 5 * 9  # a client's are constant but for the masks


def test_a_message_of_another_kind_is_none_of_a_secure_aggregation() -> None:
    content = RecordDict({"hilora": ArrayRecord({"message": Array("uint8", (1,), "x", b"1")})})
    assert not is_secured(Message(content, 1, "train"))


def test_a_clients_vector_is_clipped_as_a_whole() -> None:
    upload, one = sent(torch.full((6,), 0.5)), torch.tensor([0])
    whole = torch.cat([tensor.flatten() for tensor in vector(upload.rows(one), SENT.of(one))])
    torch.testing.assert_close(whole, torch.full_like(whole, 0.5))
    clipped = torch.cat([tensor.flatten() for tensor in vector(upload.rows(one), SENT.of(one), 2.0)])
    assert float(clipped.norm()) == pytest.approx(2.0)


@pytest.mark.parametrize("download", [SENT, GROUPED])
@pytest.mark.parametrize("missing", [None, 4])
def test_messages_that_say_no_more_than_means(download: Download, missing: int | None) -> None:
    sizes = torch.tensor([0.1, 0.4, 0.3, 0.2, 0.6, 0.8])
    upload = sent(sizes)

    def learn(places: Tensor) -> tuple[list[Any], Tensor]:
        among = torch.tensor([place for place in places.tolist() if place != missing])
        rows = [vector(upload.rows(place[None]), download.of(place[None])) for place in among]
        return [torch.stack(found).double().mean(0).numpy() for found in zip(*rows, strict=True)], among

    found = mean_upload(EXPECTED, download, SEEN, learn)
    stayed = torch.tensor([place for place in range(6) if place != missing])
    assert torch.equal(found.clients, stayed)
    assert found.images.tolist() == [1] * len(stayed)
    group = torch.zeros(6, dtype=torch.long) if download is SENT else GROUP
    means = torch.stack([sizes[stayed][group[stayed] == group[place]].mean() for place in stayed])
    torch.testing.assert_close(flat(found, download.of(stayed))[:, 0], means.double(), rtol=1e-5, atol=0)
    assert found.tiers["root"].A[0].dtype == torch.float32


def test_arrays_of_another_shape_are_an_error() -> None:
    with pytest.raises(InvalidValueError, match="other shapes"):
        mean_upload(EXPECTED, SENT, SEEN, lambda places: ([np.zeros(3)], places))


@pytest.mark.parametrize(("strategy", "options"), [("fedit", {}), ("ffa-lora", {}), ("fedsa-lora", {})])
def test_a_strategy_comes_to_the_same_by_a_secure_sum(strategy: str, options: dict[str, Any]) -> None:
    """A round by hand, with messages that the server sees and with none that it sees."""
    open_, secret = Halves(strategy, **options).one_round(), Halves(strategy, **options)
    secret.begin()
    download = secret.server.configure(secret.stage, SEEN).at(1)

    def work(place: int) -> Work:
        one = torch.tensor([place])

        def answer(order: bytes) -> Sequence[Tensor]:
            assert struct.unpack("i", order) == (place,)
            return vector(secret.ask(SEEN[one], download.of(one)), download.of(one))

        return answer

    def learn(places: Tensor) -> tuple[list[Any], Tensor]:
        grid = Grid({place + 10: Node(place + 10, work(place)) for place in places.tolist()})
        orders = {place + 10: struct.pack("i", place) for place in places.tolist()}
        mean = secure_mean(grid, orders, 8.0)
        return mean.arrays, torch.tensor(mean.nodes) - 10

    upload = mean_upload(secret.server.expected(secret.stage), download, SEEN, learn)
    upload = Reception(secret.server)(download, upload, "training", 1, 6)
    secret.server.aggregate(secret.stage, upload)
    a, b = open_.models(SEEN), secret.models(SEEN)
    assert same(
        b.tiers["root" if strategy != "fedsa-lora" else "leaf"].taken(), a.tiers[open_.server.tiers[0]].taken(), 1e-4
    )
    assert same(b.head.taken(), a.head.taken(), 1e-4)


def test_noise_goes_on_a_secure_sum_as_on_the_sum_itself() -> None:
    """Clipped by the clients and noised by the server, it is what clip and noise at the server give."""
    halves = Halves("fedit", dp_clip=2.0, dp_noise=1.0)
    upload = sent(torch.tensor([0.1, 0.4, -0.3, 0.2, 0.6, 0.8]))
    rows = [vector(upload.rows(place[None]), SENT.of(place[None]), 2.0) for place in SEEN]
    mean = [torch.stack(found).double().mean(0).numpy() for found in zip(*rows, strict=True)]
    secret = mean_upload(EXPECTED, SENT, SEEN, lambda places: (mean, places))
    found = [
        Reception(halves.server).privacy.release(one, SENT, torch.ones(6, dtype=torch.bool), 3, 6)  # type: ignore[union-attr]
        for one in (upload, secret)
    ]
    torch.testing.assert_close(flat(found[1]), flat(found[0]), rtol=1e-4, atol=1e-5)


def test_groups_of_two_heads_and_one_table() -> None:
    """What only some of the groups' parts differ in are groups, too."""
    download = Download(STAGE, {"root": shared(table(1), SEEN)}, Rows(head(2), GROUP))
    asked: list[list[int]] = []

    def learn(places: Tensor) -> tuple[list[Any], Tensor]:
        asked.append(places.tolist())
        rows = vector(Upload(SEEN[:1], SEEN[:1], {"root": table()}, head()), download.of(places[:1]))
        return [row.numpy() for row in rows], places

    mean_upload(EXPECTED, download, SEEN, learn)
    assert asked == [[0, 2], [1, 3, 4, 5]]
