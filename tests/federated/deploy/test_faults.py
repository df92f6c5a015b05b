"""Clients that fail are left out of the round, by name, and the others' mean is the round's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flwr.app import Message

from hilora.federated.deploy.server import NobodyAnsweredError
from tests.federated.deploy.conftest import Make, World
from tests.federated.deploy.faults import changed, received, sends, silent
from tests.federated.deploy.grid import Node
from tests.federated.deploy.rounding import close

SHORT: dict[str, Any] = {"strategy": "fedit", "rounds": "1,1,0", "evaluate_every": 0}
ONCE = SHORT | {"rounds": "1,0,0"}


def left_out(world: World, node: Node) -> list[str | None]:
    """The reason, round by round, why a node's client was left out."""
    client = str(node.context.node_config["client-id"])
    return [record.get("left_out", {}).get(client) for record in world.records]


@pytest.fixture
def others(world: Make) -> Any:
    """Where the server gets to without client 3."""
    if not OTHERS:
        there = world(**ONCE)
        silent(there.nodes[3])
        OTHERS.update(there.run().server.state_dict())
    return OTHERS


OTHERS: dict[str, Any] = {}


def tensor(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Node], None]:
    def fault(node: Node) -> None:
        changed(
            node, lambda tree: tree["tiers"]["root"].update({"0.lora_B": change(tree["tiers"]["root"]["0.lora_B"])})
        )

    return fault


def field(change: Callable[[dict[str, Any]], Any]) -> Callable[[Node], None]:
    return lambda node: changed(node, lambda tree: change(tree) and None)


FAULTS: dict[str, tuple[Callable[[Node], None], str]] = {
    "vanishes": (silent, "no answer within 0.05 s"),
    "NaN": (tensor(lambda value: value * torch.nan), "root: 0.lora_B is not finite"),
    "infinite": (tensor(lambda value: value + torch.inf), "root: 0.lora_B is not finite"),
    "another shape": (
        tensor(lambda value: value[:, :-1].clone()),
        "root: 0.lora_B is torch.float32 [4, 23, 2], expected",
    ),
    "another rank": (
        tensor(lambda value: value[..., :1].clone()),
        "root: 0.lora_B is torch.float32 [4, 24, 1], expected",
    ),
    "another dtype": (tensor(lambda value: value.double()), "root: 0.lora_B is torch.float64"),
    "no head": (field(lambda tree: tree.update(head=None)), "no head was sent, expected one"),
    "no adapters": (field(lambda tree: tree.update(tiers={})), "adapters of nothing were sent, expected root"),
    "another tier": (
        field(lambda tree: tree.update(tiers={"leaf": tree["tiers"]["root"]})),
        "adapters of leaf were sent, expected root",
    ),
    "a tensor more": (
        field(lambda tree: tree["head"].update(secret=torch.zeros(1))),
        "the head has bias, secret, weight, expected bias, weight",
    ),
    "a choice": (field(lambda tree: tree.update(choice=1)), "a choice was sent, expected none"),
    "a field more": (field(lambda tree: tree.update(images_seen=[1, 2])), "images_seen: Extra inputs"),
    "negative images": (field(lambda tree: tree.update(images=-5)), "images: Input should be greater"),
    "endless images": (field(lambda tree: tree.update(images=10**30)), "images: Input should be less"),
    "images in words": (field(lambda tree: tree.update(images="ten")), "images: Input should be a valid integer"),
    "another round": (
        field(lambda tree: tree["errand"].update(number=7)),
        "it answers to training, round 7 (stage root, its round 1), expected training, round 1 (stage root",
    ),
    "another stage": (
        field(lambda tree: tree["errand"].update(stage=["leaf", 1, "leaf", "train", False])),
        "(stage leaf, its round 1), expected training, round 1 (stage root",
    ),
    "another run": (field(lambda tree: tree["errand"].update(run="0" * 16)), "it answers to"),
    "another client": (field(lambda tree: tree.update(client=1)), "it answers as client 1"),
    "another kind": (
        lambda node: changed(
            node, lambda tree: {"kind": "counts", "errand": tree["errand"], "client": 3, "val": [1, 2], "test": [1, 2]}
        ),
        "it answers with 'counts', expected 'done'",
    ),
    "no kind": (field(lambda tree: tree.update(kind=["done"])), "expected done or counts"),
    "no file": (
        lambda node: sends(node, lambda data: b"cos\nsystem\n(S'true'\ntR."),
        "what was received is not readable",
    ),
    "nothing": (lambda node: sends(node, lambda data: b""), "what was received is not readable"),
    "a damaged file": (lambda node: sends(node, lambda data: data[:-1] + bytes([data[-1] ^ 1])), "is damaged"),
    "half a file": (lambda node: sends(node, lambda data: data[: len(data) // 2]), "what was received is not readable"),
    "an error of ours": (lambda node: changed(node, lambda tree: {"kind": "refused", "reason": "tired"}), "tired"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_that_fails_is_left_out_by_name(world: Make, others: Any, name: str) -> None:
    fault, reason = FAULTS[name]
    there = world(**ONCE)
    fault(there.nodes[3])
    deployed = there.run()
    close(deployed.server.state_dict(), others)
    (said,) = left_out(there, there.nodes[3])
    assert said is not None
    assert reason in said
    (record,) = there.records
    assert (record["clients"], list(record["left_out"])) == (3, ["3"])


def test_an_app_that_raises_is_left_out_with_what_flower_says(world: Make, others: Any) -> None:
    there = world(**ONCE)
    node = there.nodes[3]
    node.fault = lambda message: (
        node.answer(message) if message.metadata.message_type != "train" else node.failed(message)
    )
    close(there.run().server.state_dict(), others)
    assert left_out(there, node) == ["Flower says: no more disk"]


def test_a_client_that_comes_back_takes_part_again(world: Make) -> None:
    there = world(**SHORT)
    silent(there.nodes[1], times=1)
    there.run()
    assert left_out(there, there.nodes[1]) == ["no answer within 0.05 s", None]
    assert [record["clients"] for record in there.records] == [3, 4]


def test_a_client_that_is_not_connected_is_named_and_not_asked(world: Make) -> None:
    there = world(**SHORT)
    gone = there.nodes[3]
    there.grid.before = lambda message: _drop(there, gone) if message.metadata.message_type == "train" else None
    there.run()
    assert left_out(there, gone) == ["no answer within 0.05 s", "is not connected"]
    assert gone.answered == ["query"]


def _drop(there: World, node: Node) -> None:
    there.grid.nodes.pop(node.number, None)


def test_an_evaluation_that_fails_is_left_out_of_the_mean(world: Make) -> None:
    there, whole = world(**SHORT), world(**SHORT)
    silent(there.nodes[0], "evaluate")
    changed(there.nodes[1], lambda tree: tree.update(test=[9, 8]), "evaluate")
    summary, expected = there.run().summary(), whole.run().summary()
    found, known = summary["per_client"]["test"], expected["per_client"]["test"]
    assert found[2:] == known[2:]
    assert all(value != value for value in found[:2])
    close(there.last.server.state_dict(), whole.last.server.state_dict())


def test_where_nobody_answers_the_run_says_so_and_ends(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    there = world(**SHORT, patience=2)
    for node in there.nodes:
        silent(node)
    with pytest.raises(
        NobodyAnsweredError, match=r"nobody answered in 2 attempts of 0\.05 s; with resume=true the run goes on"
    ):
        there.run()
    assert "nobody answered, attempt 1 of 2" in caplog.text
    assert (there.out / "summary.json").is_file()  # what was reached


def test_a_round_that_nobody_answers_is_tried_again(world: Make) -> None:
    there, whole = world(**SHORT), world(**SHORT)
    for node in there.nodes:
        silent(node, times=1)
    close(there.run().server.state_dict(), whole.run().server.state_dict())


def test_a_server_waits_for_its_clients_and_says_who_is_there(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    there = world(**SHORT, wait=1.5)
    del there.grid.nodes[101]
    with pytest.raises(NobodyAnsweredError, match=r"too few clients after 1.5 s: 3 of 4 are here \(0, 2, 3\)"):
        there.run()
    assert "waiting for clients: 3 of 4 are here (0, 2, 3)" in caplog.text


def test_two_nodes_are_not_one_client(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    there, whole = world(**ONCE), world(**ONCE)
    twin = there.node(200, 3)
    there.grid.nodes[200] = twin
    close(there.run().server.state_dict(), whole.run().server.state_dict())
    assert twin.answered == ["query"]
    assert "node 200 is refused: it says that it is client 3, which node 103 is" in caplog.text


def test_a_client_on_a_new_node_takes_its_place_when_the_old_one_is_gone(world: Make) -> None:
    there = world(**{**SHORT, "rounds": "1,1,1"})

    def move(message: Message) -> None:
        if message.metadata.message_type == "train" and 103 in there.grid.nodes:
            del there.grid.nodes[103]
            there.grid.nodes[200] = there.node(200, 3)

    there.grid.before = move
    there.run()
    assert left_out(there, there.nodes[3]) == ["no answer within 0.05 s", "is not connected", None]
    assert there.grid.nodes[200].answered == ["query", "train", "evaluate"]


@pytest.mark.parametrize(("says", "reason"), [(9, "expected 0 to 3"), (-1, "at the client"), ("x", "at the client")])
def test_strangers_are_refused(world: Make, caplog: pytest.LogCaptureFixture, says: Any, reason: str) -> None:
    there, whole = world(**ONCE), world(**ONCE)
    stranger = there.node(200, says)
    if says == 9:
        there.grid.nodes[200] = there.node(200, 0)
        changed(there.grid.nodes[200], lambda tree: tree.update(client=9), "query")
    else:
        there.grid.nodes[200] = stranger
    close(there.run().server.state_dict(), whole.run().server.state_dict())
    assert there.grid.nodes[200].answered == ["query"]
    assert "node 200 is refused" in caplog.text
    assert reason in caplog.text


def test_other_weights_of_the_backbone_are_refused(world: Make, caplog: pytest.LogCaptureFixture) -> None:
    there = world(**SHORT, wait=1.5)
    changed(there.nodes[0], lambda tree: tree.update(backbone="0" * 32), "query")
    with pytest.raises(NobodyAnsweredError, match="3 of 4"):
        there.run()
    assert "client 0 has other weights of the backbone than the server" in caplog.text


@pytest.mark.parametrize("rounds", ["2,1,1", "1,2,1"])
def test_a_client_that_comes_later_takes_part_from_then_on(world: Make, rounds: str) -> None:
    there = world(strategy="hilora", rounds=rounds, min_clients=3)
    late = there.grid.nodes.pop(103)

    def arrive(message: Message) -> None:
        if message.metadata.message_type == "evaluate" and received(message)["errand"]["number"] == int(rounds[0]):
            there.grid.nodes[103] = late

    there.grid.before = arrive
    deployed = there.run()
    assert [record["clients"] for record in there.records][-1] == 4
    assert there.records[0]["clients"] == 3
    assert int(deployed.server.grouping.member[3]) >= 0  # type: ignore[attr-defined]
    assert deployed.summary()["per_client"]["ids"] == [0, 1, 2, 3]


def test_an_update_that_is_too_large_is_left_out_where_a_bound_is_set(world: Make, others: Any) -> None:
    there = world(**ONCE, update_bound=100.0)
    tensor(lambda value: value * 1e6)(there.nodes[3])
    close(there.run().server.state_dict(), others)
    (said,) = left_out(there, there.nodes[3])
    assert said is not None
    assert "more than 100" in said


@pytest.mark.parametrize("choice", [5, 2**52])
def test_a_choice_that_is_none_is_left_out(world: Make, choice: int) -> None:
    there = world(**ONCE | {"strategy": "ifca"})
    changed(there.nodes[3], lambda tree: tree.update(choice=choice))
    there.run()
    assert left_out(there, there.nodes[3]) == ["a choice that is none of 5"]
