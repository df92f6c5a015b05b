"""The strategies on Flower's deployment engine: three SuperNodes, TLS, a proxy that records what they send.

All tests share one network. Where tests are spread over processes, each of these has a network of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.federated.archive import unpacked
from hilora.federated.deploy import messages
from hilora.federated.deploy.flower import ARRAY, RECORD, data_of
from hilora.models.backbone import load_backbone
from tests.docs.pages import ROOT
from tests.federated.deploy.loopback import loopback, until
from tests.federated.deploy.network import CLASSES, CLIENTS, Network, pixels
from tests.federated.deploy.recorder import recorder
from tests.federated.deploy.rounding import close, products, steady
from tests.federated.deploy.secrets import Haystack, needles
from tests.federated.test_federation import tensors

pytestmark = pytest.mark.slow

STRATEGIES = ("hilora", "flexlora", "fedsa-lora", "ifca", "fedalt")
"""Three tiers and groups; means of products; a half of an adapter; a choice of several; a gate."""
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
PAGE = (ROOT / "docs" / "guides" / "what-leaves-a-client.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    folder = tmp_path_factory.mktemp("network")
    with loopback(folder) as link, recorder(link.certificates, link.port) as record:
        yield Network(link, record, folder)


def own(value: Any) -> dict[str, Tensor]:
    """A client's own state. When `ifca` last looked is not compared: a simulation looks once more at its end."""
    return {name: tensor for name, tensor in tensors(value) if name != ".choice.round"}


def same_as_simulated(network: Network, name: str, **config: Any) -> None:
    simulation, threads = network.simulation(name, **config), torch.get_num_threads()
    torch.set_num_threads(1)  # as the clients have
    with pytest.MonkeyPatch.context() as patch:
        steady(patch)
        expected, summary = simulation.run(), network.summary(name)
    torch.set_num_threads(threads)
    there, here = network.checkpoint(name)["strategy"], simulation.server.state_dict()
    if config["strategy"] == "flexlora":
        there["root"], here["root"] = products(there["root"]), products(here["root"])
    close(there, here)
    assert summary["per_client"]["test"] == pytest.approx(expected["per_client"]["test"], nan_ok=True)
    for client in range(CLIENTS):
        kept = {table: rows.rows(torch.tensor([client])) for table, rows in simulation.store.tables.items()}
        close(own(network.private(name, client)["store"]["tables"]), own(kept))


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_deployment_gives_the_numbers_of_a_simulation(network: Network, name: str) -> None:
    network.run(name, strategy=name)
    same_as_simulated(network, name, strategy=name)


def test_a_client_that_is_killed_in_a_round_is_left_out_of_it_and_comes_back(network: Network) -> None:
    with network.waiting(client=2, number=1) as reached:
        run = network.begin("killed", faulty=True, strategy="fedit", rounds="30,0,0", deadline=30.0)
        reached()
        network.link.kill_node(2)
    until(lambda: network.records("killed"), "the first round is over")
    (first, *_) = network.records("killed")
    assert (first["clients"], first["left_out"]) == (2, {"2": "no answer within 30 s"})
    network.start(2)
    until(lambda: network.records("killed")[-1]["clients"] == 3, "client 2 takes part again")
    network.link.stop(run)
    assert "left_out" not in network.records("killed")[-1]
    assert "round 1: left out client 2: no answer within 30 s" in network.link.finish(run)


def test_an_update_that_is_not_a_number_is_left_out_and_nothing_of_it_is_in_the_mean(network: Network) -> None:
    poison = network.faults / "poison1"
    poison.touch()
    said = network.end(network.begin("poisoned", faulty=True, strategy="fedit", rounds="1,0,0"))
    poison.unlink()
    (record,) = network.records("poisoned")
    assert set(record["left_out"]) == {"1"}
    assert "is not finite" in record["left_out"]["1"]
    assert "left out client 1" in said
    assert all(tensor.isfinite().all() for _, tensor in tensors(network.checkpoint("poisoned")["strategy"]))


def test_a_server_that_is_killed_goes_on_from_its_checkpoint(network: Network) -> None:
    """In the leaf's stage, so that the clients' own states must go on as well."""
    config: dict[str, Any] = {"strategy": "hilora", "rounds": "1,1,2"}
    with network.waiting(client=0, number=4) as reached:
        run = network.begin("resumed", faulty=True, **config)
        reached()
        network.link.kill_server()
    network.link.stop(run)
    assert not (network.folder / "resumed" / "summary.json").exists()
    network.end(network.begin("resumed", faulty=True, resume=True, **config))
    assert [record["stage"] for record in network.records("resumed")] == ["root", "cluster", "leaf", "leaf"]
    same_as_simulated(network, "resumed", **config)


def test_what_is_private_is_in_nothing_that_clients_send(network: Network) -> None:
    for name in ("hilora", "fedalt"):
        network.run(name, strategy=name)
    sent = Haystack(bytes(stream) for stream in network.recorder.sent)
    backbone = load_backbone("glyph_vit")
    mean, std = (value.view(3, 1, 1) for value in (backbone.mean, backbone.std))
    for client in range(CLIENTS):
        kept = network.private("hilora", client)
        leaf = dict(tensors([kept["store"], kept["before"]]))
        assert {"leaf", "head"} <= set(kept["store"]["tables"])
        assert sent.found(needles(leaf.values(), FLOATS)) == set()

        images = network.images(client)
        for one in (images.train, images.test):
            assert sent.found(needles(pixels(one), (torch.uint8,))) == set()
            scaled = (pixels(one) / 255 - mean) / std
            assert sent.found(needles(scaled, FLOATS)) == set()
            with torch.no_grad():
                features = backbone.model(scaled)
            by_class = torch.stack([features[one.labels == label].mean(0) for label in one.labels.unique()])
            moments = [scaled.mean((2, 3)), scaled.std((2, 3)), scaled.mean((0, 2, 3)), scaled.std((0, 2, 3))]
            assert sent.found(needles([features, by_class, *moments], FLOATS)) == set()
            labels = [one.labels, torch.bincount(one.labels, minlength=len(CLASSES))]
            assert sent.found(needles(labels, (torch.int64, torch.int32, torch.float32))) == set()
        pictures = [picture.read_bytes()[50:] for picture in (network.folder / f"client{client}").rglob("*.png")]
        assert len(pictures) >= 18
        assert sent.found(pictures) == set()


def test_what_is_uploaded_is_found_by_the_same_search(network: Network) -> None:
    """The adapters of each client as the server of `fedalt` has them, and HiLoRA's root."""
    for name in ("hilora", "fedalt"):
        network.run(name, strategy=name)
    sent = Haystack(bytes(stream) for stream in network.recorder.sent)
    uploaded = dict(tensors(network.checkpoint("fedalt")["strategy"]["uploaded"]))
    factors = [value for name, value in uploaded.items() if "lora_" in name]
    there = list(needles([row for factor in factors for row in factor], (torch.float32,)))
    assert len(factors) >= 2
    assert sent.found(there) == set(there)
    roots = [tree["tiers"]["root"] for tree in trees(network) if tree["kind"] == "done" and "root" in tree["tiers"]]
    assert len(roots) >= CLIENTS
    there = list(needles(roots[0].values(), (torch.float32,)))
    assert sent.found(there) == set(there)


def trees(network: Network) -> list[dict[str, Any]]:
    """All messages that clients have sent, and no other content of Flower's messages."""
    made = []
    for message in network.recorder.messages():
        assert {name: list(record) for name, record in message.content.items()} == {RECORD: [ARRAY]}
        made.append(unpacked(data_of(message.content)))
    return made


def listed() -> dict[str, set[str]]:
    """The fields of each message, as the page has them."""
    table = PAGE.partition("| message | field |")[2].partition("\n\n")[0]
    fields: dict[str, set[str]] = {}
    kind = ""
    for line in table.splitlines()[2:]:
        message, field, *_ = (cell.strip() for cell in line.strip("|").split("|"))
        kind = message.strip("`") or kind
        fields.setdefault(kind, set()).update(re.findall(r"`(\w+)`", field))
    return fields


def test_the_page_has_all_fields_that_a_client_can_send() -> None:
    kinds = (messages.Present, messages.Lacks, messages.Done, messages.Counts, messages.Refused)
    named = {kind.model_fields["kind"].default: set(kind.model_fields) - {"kind"} for kind in kinds}
    assert listed() == named


def test_clients_send_what_the_page_says_and_nothing_else(network: Network) -> None:
    for name in ("hilora", "ifca"):
        network.run(name, strategy=name)
    fields = listed()
    seen = set()
    for tree in trees(network):
        kind = tree.pop("kind")
        assert set(tree) == fields[kind]
        seen |= {(kind, name) for name, value in tree.items() if value not in (None, {})}
        for part in (*tree.get("tiers", {}).values(), tree.get("head") or {}):
            for name in part:
                assert f"`{name.rpartition('.')[2]}`" in PAGE
    assert {("present", "images"), ("done", "tiers"), ("done", "head"), ("done", "choice"), ("counts", "val")} <= seen


def test_a_supernode_asks_for_what_the_page_says_and_nothing_else(network: Network) -> None:
    network.run("hilora", strategy="hilora")
    table = PAGE.partition("## What Flower adds")[2].partition("## Strategy by strategy")[0]
    requests = network.recorder.requests()
    paths = {request.path for request in requests}
    assert {path.removeprefix("/v1/fleet/") for path in paths} <= set(re.findall(r"`([\w-]+)`", table))
    assert {"/v1/fleet/push-object", "/v1/fleet/push-messages"} <= paths
    usual = {"host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length"}
    flowers = {"public-key", "timestamp", "signature", "package-name", "package-version", "component-name"}
    assert {name for request in requests for name in request.headers} == usual | {f"flwr-{name}" for name in flowers}
