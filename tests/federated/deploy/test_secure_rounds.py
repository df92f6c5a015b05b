"""A deployment with secure aggregation gives the plain one's numbers, and its server sees no update by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage

from hilora.errors import InvalidValueError
from hilora.federated.archive import unpacked
from hilora.federated.deploy.flower import RECORD, data_of
from hilora.federated.deploy.server import NobodyAnsweredError
from hilora.federated.deploy.settings import asked
from hilora.federated.strategies import STRATEGIES
from tests.federated.deploy.conftest import CONFIG, Make, World
from tests.federated.deploy.faults import silent
from tests.federated.deploy.grid import Node
from tests.federated.test_federation import tensors

SHORT: dict[str, Any] = {"strategy": "fedit", "rounds": "2,0,0", "evaluate_every": 0}
ONCE = {"rounds": "1,0,0"}
SECURE = SHORT | {"secure_aggregation": True}


ROUNDED = 1e-5
"""Vectors are rounded to steps of 2^-18."""


def like(one: Any, other: Any, atol: float = ROUNDED) -> None:
    """Two states are the same but for rounding."""
    left, right = dict(tensors(one)), dict(tensors(other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=atol)


def step_of(message: Message) -> str | None:
    """Which step of a secure aggregation a message asks for."""
    records = message.content.config_records
    return str(records[RECORD_KEY_CONFIGS][Key.STAGE]) if RECORD_KEY_CONFIGS in records else None


def drops(node: Node, step: str, reply: Callable[[Message], Message | None], times: int = 1) -> None:
    """The node answers the messages of a step with something else, so many times."""
    left = [times]

    def fault(message: Message) -> Message | None:
        if step_of(message) == step and left[0]:
            left[0] -= 1
            return reply(message)
        return node.answer(message)

    node.fault = fault


def recorded(there: World) -> list[Message]:
    """The replies of all nodes, which are remembered from now on."""
    found: list[Message] = []

    def remember(node: Node) -> Callable[[Message], Message | None]:
        def fault(message: Message) -> Message | None:
            found.append(node.answer(message))
            return found[-1]

        return fault

    for node in there.nodes:
        node.fault = remember(node)
    return found


@pytest.mark.parametrize("method", ["fedit", "ffa-lora", "fedsa-lora", "feddpa-f", "pf2lora"])
def test_the_numbers_are_those_of_a_plain_run(world: Make, method: str) -> None:
    once = {"strategy": method, **ONCE}
    plain, secure = world(**SHORT | once), world(**SECURE | once)
    one, other = plain.run(), secure.run()
    like(other.server.state_dict(), one.server.state_dict())
    assert [record["clients"] for record in secure.records] == [record["clients"] for record in plain.records]
    assert not any("left_out" in record for record in secure.records)
    assert other.summary()["per_client"]["test"] == pytest.approx(one.summary()["per_client"]["test"], abs=0.006)


@pytest.mark.parametrize("kept", [False, True])
def test_what_clients_keep_goes_on_from_round_to_round(world: Make, tmp_path: Path, kept: bool) -> None:
    """In a file or in Flower's context. AdamW makes more of what was rounded."""
    plain, secure = (
        world(**options | {"strategy": "fedsa-lora"}, state=tmp_path if kept else None) for options in (SHORT, SECURE)
    )
    one, other = plain.run(), secure.run()
    like(other.server.state_dict(), one.server.state_dict(), 5e-3)
    assert [record["clients"] for record in secure.records] == [4, 4]


def test_hilora_whose_groups_are_known_is_summed_group_by_group(world: Make) -> None:
    config = {"strategy": "hilora", "groups": "true", "aggregation": "factors", "rounds": "1,1,1", "evaluate_every": 0}
    found = []
    for options in ({}, {"secure_aggregation": True}):
        there = world(**config, **options)
        deployed = there.deployment()
        deployed.server.grouping.true_groups = torch.tensor([0, 0, 0, 1])  # type: ignore[attr-defined]
        deployed.run()
        there.last = deployed
        found.append((deployed, there))
    (plain, _), (secure, there) = found
    like(secure.server.root, plain.server.root)  # type: ignore[attr-defined]
    clusters = [one.server.cluster.rows(torch.tensor([0])) for one in (secure, plain)]  # type: ignore[attr-defined]
    like(clusters[0], clusters[1], 5e-3)
    assert any(bool(B.any()) for B in clusters[0].B)
    root, cluster, leaf = there.records
    assert (root["clients"], cluster["clients"], leaf["clients"]) == (4, 3, 4)
    assert cluster["left_out"] == {"3": "a sum over 1 clients keeps no secret: expected at least 3"}
    assert not any(bool(B[1].any()) for B in secure.server.cluster.B)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("step", "reply", "reason"),
    [
        (Stage.SETUP, lambda message: None, "no answer within 0.05 s"),
        (Stage.SHARE_KEYS, lambda message: Message(Error(2, "no more disk"), reply_to=message), "no more disk"),
        (Stage.COLLECT_MASKED_VECTORS, lambda message: None, "no answer within 0.05 s"),
    ],
)
def test_one_client_that_drops_out_is_left_out_of_the_sum(world: Make, step: str, reply: Any, reason: str) -> None:
    plain, secure = world(**SHORT | ONCE), world(**SECURE | ONCE)
    silent(plain.nodes[1])
    drops(secure.nodes[1], step, reply)
    like(secure.run().server.state_dict(), plain.run().server.state_dict())
    (record,) = secure.records
    assert record["clients"] == 3
    assert list(record["left_out"]) == ["1"]
    assert reason in record["left_out"]["1"]


def test_a_client_that_drops_out_after_its_vector_is_in_the_sum(world: Make) -> None:
    plain, secure = world(**SHORT | ONCE), world(**SECURE | ONCE)
    drops(secure.nodes[1], Stage.UNMASK, lambda message: None)
    like(secure.run().server.state_dict(), plain.run().server.state_dict())
    assert [record["clients"] for record in secure.records] == [4]


def test_a_client_that_lost_what_it_was_sent_drops_out_once(world: Make) -> None:
    secure = world(**SECURE | {"strategy": "ffa-lora", "rounds": "3,0,0"})
    drops(secure.nodes[2], Stage.COLLECT_MASKED_VECTORS, lambda message: restarted(secure.nodes[2], message))
    secure.run()
    assert [record["clients"] for record in secure.records] == [3, 4, 4]
    secure = world(**SECURE | {"strategy": "ffa-lora", "rounds": "3,0,0"})
    secure.grid.before = forgets(secure.nodes[2], number=2)
    secure.run()
    left = [record.get("left_out") for record in secure.records]
    assert left == [None, {"2": "Flower says: lacks parts that it was sent"}, None]


def restarted(node: Node, message: Message) -> Message | None:
    """It does not answer, and what it had is gone."""
    node.renew()
    return None


def forgets(node: Node, number: int) -> Callable[[Message], None]:
    """Before a secure sum of a number begins, what the node had is gone."""
    begun = [0]

    def before(message: Message) -> None:
        if message.metadata.dst_node_id == node.number and step_of(message) == Stage.SETUP:
            begun[0] += 1
            if begun[0] == number:
                node.renew()

    return before


def test_a_sum_that_fails_is_tried_again(world: Make) -> None:
    plain, secure = world(**SHORT | ONCE), world(**SECURE | ONCE)
    for node in secure.nodes[:2]:
        drops(node, Stage.COLLECT_MASKED_VECTORS, lambda message: None)
    like(secure.run().server.state_dict(), plain.run().server.state_dict())
    assert not any("left_out" in record for record in secure.records)


def test_sums_that_fail_as_often_as_patience_allows_end_the_run(world: Make) -> None:
    secure = world(**SECURE, patience=2)
    for node in secure.nodes[:2]:
        drops(node, Stage.COLLECT_MASKED_VECTORS, lambda message: None, times=9)
    with pytest.raises(NobodyAnsweredError, match=r"nobody answered in 2 attempts.*fewer than 3 stayed to its end"):
        secure.run()


def test_what_is_no_answer_ends_the_sum_and_not_the_server(world: Make) -> None:
    plain, secure = world(**SHORT | ONCE), world(**SECURE | ONCE)
    drops(secure.nodes[0], Stage.COLLECT_MASKED_VECTORS, lambda message: Message(message.content, reply_to=message))
    like(secure.run().server.state_dict(), plain.run().server.state_dict())


def test_the_server_is_sent_no_update_and_no_number_of_images(world: Make) -> None:
    there = world(**SECURE | {"strategy": "fedsa-lora"})
    replies = recorded(there)
    there.run()
    kinds = set()
    for reply in replies:
        if RECORD in reply.content:
            tree = unpacked(data_of(reply.content))
            kinds.add(tree["kind"])
            assert tree["kind"] in ("present", "counts")
            assert tree.get("images") is None
            assert all(tree[split][1] in (0, 100) for split in ("val", "test") if split in tree)
        else:
            assert not any(len(record) for record in reply.content.array_records.values())
            for record in reply.content.metric_records.values():
                assert dict(record) == {"num_examples": 1}
    assert kinds == {"present", "counts"}
    assert all(record["images"] == 0 for record in there.records)


def test_under_differential_privacy_no_number_of_images_is_sent_either(world: Make) -> None:
    there = world(**SHORT | {"dp_clip": 1.0})
    replies = recorded(there)
    there.run()
    trees = [unpacked(data_of(reply.content)) for reply in replies]
    assert {tree["images"] for tree in trees if tree["kind"] == "present"} == {None}
    assert {tree["images"] for tree in trees if tree["kind"] == "done"} == {1}
    assert {tree[split][1] for tree in trees if tree["kind"] == "counts" for split in ("val", "test")} <= {0, 100}


def test_noise_goes_on_the_secure_sum(world: Make) -> None:
    """With next to no noise it is the mean of the clipped updates."""
    private = {"dp_clip": 0.1, "dp_noise": 1e-6}
    plain, secure = world(**SHORT, **private), world(**SECURE, **private)
    like(secure.run().server.state_dict(), plain.run().server.state_dict(), 1e-5)
    assert secure.last.summary()["privacy"]["releases"] == 2


def test_a_client_refuses_to_send_an_update_by_itself(world: Make) -> None:
    """A server that asks for it all the same, as one that was not told of secure aggregation."""
    there = world(**SECURE, patience=1)
    with pytest.raises(NobodyAnsweredError, match="this run has secure aggregation: an update goes into a sum alone"):
        there.run(secure_aggregation=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"robust": "median"}, "secure-aggregation with robust: nobody can look at single updates"),
        ({"update-bound": 3.0}, "secure-aggregation with update-bound: nobody can look"),
        (
            {"participation": 0.5},
            "secure-aggregation with 2 clients in a round: a sum over fewer than 3",
        ),
        ({"min-clients": 2}, "secure-aggregation with 2 clients in a round"),
    ],
)
def test_what_cannot_go_together_is_refused_at_the_start(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        asked(CONFIG | {"strategy": "fedit", "secure-aggregation": True} | change)


def test_strategies_that_need_more_than_sums_are_refused_by_name() -> None:
    travel = [name for name, kind in STRATEGIES.items() if kind.travels]
    refused = [name for name in travel if not STRATEGIES[name]().sums]
    assert {"hilora", "ifca", "fedalt"} <= set(refused)
    for name in travel:
        config = CONFIG | {"strategy": name, "secure-aggregation": True}
        if name not in refused:
            assert asked(config).sizes_are_secret
            continue
        with pytest.raises(InvalidValueError, match=f"secure-aggregation with strategy='{name}': its server needs"):
            asked(config)
