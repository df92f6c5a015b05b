"""Servers and clients that die go on where they were, and the numbers are those of a run that nobody stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import Message

from hilora.errors import FileError
from hilora.federated.archive import unpacked
from hilora.federated.deploy.private import load_private
from tests.federated.deploy.conftest import CLIENTS, Make, World
from tests.federated.deploy.faults import received
from tests.federated.deploy.grid import Node
from tests.federated.deploy.rounding import close

LONG = {"strategy": "hilora", "rounds": "1,1,2"}


class PulledPlugError(BaseException):
    """The server's process is gone."""


def private(folder: Path) -> dict[int, Any]:
    """What the clients' files have, by client."""
    trees = [unpacked(path) for path in sorted(folder.glob("*.safetensors"))]
    return {tree["client"]: tree["store"] for tree in trees}


def dies(world: World, number: int, after: int, kind: str = "train") -> None:
    """The server dies in a round of the run, after so many clients had its message."""
    seen = [0]

    def before(message: Message) -> None:
        if message.metadata.message_type == kind and received(message)["errand"]["number"] == number:
            seen[0] += 1
            if seen[0] > after:
                raise PulledPlugError

    world.grid.before = before


@pytest.mark.parametrize(
    ("method", "number", "after", "kind"),
    [("hilora", 1, 2, "train"), ("fdlora", 2, 1, "train"), ("hilora", 3, 2, "evaluate"), ("hilora", 4, 3, "train")],
)
def test_a_server_that_dies_goes_on_and_gives_the_same_numbers(
    world: Make, tmp_path: Path, method: str, number: int, after: int, kind: str
) -> None:
    options = {**LONG, "strategy": method, "evaluate_every": 1}
    there, whole = world(**options, state=tmp_path / "a"), world(**options, state=tmp_path / "b")
    dies(there, number, after, kind)
    with pytest.raises(PulledPlugError):
        there.run()
    assert len(there.records) == number - 1
    there.grid.before = lambda message: None
    for node in there.nodes:  # another run, for Flower
        node.restart()
    deployed, expected = there.run(resume=True), whole.run()
    close(deployed.server.state_dict(), expected.server.state_dict())
    close(private(tmp_path / "a"), private(tmp_path / "b"))
    assert len(there.records) == len(whole.records) == 4
    assert deployed.summary()["per_client"] == expected.summary()["per_client"]


def test_clients_that_restart_after_every_message_keep_what_is_theirs(world: Make, tmp_path: Path) -> None:
    there, whole = world(**LONG, state=tmp_path / "a"), world(**LONG)
    for node in there.nodes:
        node.fault = lambda message, node=node: (node.renew(), node.answer(message))[1]
    close(there.run().server.state_dict(), whole.run().server.state_dict())
    assert there.last.summary()["per_client"] == whole.last.summary()["per_client"]
    assert there.last.post.down.tolist() == whole.last.post.down.tolist()  # and nothing is sent twice
    kept = private(tmp_path / "a")
    assert sorted(kept) == list(range(CLIENTS))
    assert all(set(store["tables"]) == {"leaf", "head"} for store in kept.values())
    assert all(len(table) == 1 for store in kept.values() for table in store["tables"].values())  # its own row alone


def test_what_a_client_has_lost_is_sent_once_more(world: Make) -> None:
    options = {**LONG, "strategy": "ifca", "rounds": "1,1,1"}
    there, whole = world(**options), world(**options)
    lost: list[Node] = there.nodes[:2]

    def before(message: Message) -> None:
        if message.metadata.message_type == "train" and received(message)["errand"]["number"] == 2:
            for node in lost:
                node.restart()
            lost.clear()

    there.grid.before = before
    close(there.run().server.state_dict(), whole.run().server.state_dict())
    more = there.last.post.down - whole.last.post.down
    assert (more[:2] > 0).all()
    assert more[2:].tolist() == [0, 0]
    assert there.nodes[0].answered.count("train") == 4
    assert all("left_out" not in record for record in there.records)


def test_a_new_run_takes_nothing_from_an_older_one(world: Make, tmp_path: Path) -> None:
    state = tmp_path / "state"
    first, second = world(**LONG, state=state), world(**LONG, state=state)
    close(first.run().server.state_dict(), second.run().server.state_dict())
    assert first.last.summary()["per_client"] == second.last.summary()["per_client"]
    assert len(list(state.iterdir())) == 2 * CLIENTS  # the older run's are there still
    assert first.last.id != second.last.id


def test_a_damaged_private_state_is_said_and_the_client_left_out(world: Make, tmp_path: Path) -> None:
    there = world(**LONG, state=tmp_path)

    def before(message: Message) -> None:
        if message.metadata.message_type == "train" and received(message)["errand"]["number"] == 4:
            for path in tmp_path.glob("client-2.*"):
                path.write_bytes(path.read_bytes()[:-8])

    there.grid.before = before
    there.run()
    assert there.records[3]["left_out"] == {"2": "FileError at the client, whose log says more"}
    assert there.records[3]["clients"] == CLIENTS - 1


def test_what_one_method_keeps_no_other_is_given(world: Make, tmp_path: Path) -> None:
    world(**LONG, state=tmp_path).run()
    (path,) = tmp_path.glob("client-2.*")
    run = unpacked(path)["run"]
    assert load_private(tmp_path, 2, run, "hilora").store.has["leaf"].tolist() == [True]
    with pytest.raises(
        FileError, match=f"of client 2 in run {run} of hilora, expected client 2 in run {run} of fdlora"
    ):
        load_private(tmp_path, 2, run, "fdlora")  # which sends its personal adapter


def test_a_run_with_other_settings_is_not_resumed(world: Make) -> None:
    there = world(strategy="fedit", rounds="1,0,0")
    there.run()
    with pytest.raises(FileError, match="of another run: batch_size was 4, now 8"):
        there.deployment(resume=True, batch_size=8)
