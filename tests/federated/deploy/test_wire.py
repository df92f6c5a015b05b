"""What is read from a message is what was written into it, to the bit, and weighs what the post counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from hilora.adapters.io.files import checksum
from hilora.adapters.table import AdapterTable
from hilora.federated.archive import FORMAT, packed
from hilora.federated.deploy import member, server
from hilora.federated.deploy.messages import Done, Errand, Hello, MessageError, Order, Present, of_bytes, to_bytes
from hilora.federated.deploy.wire import Layout, done, downloaded, order, read, received, together, uploaded, written
from hilora.federated.protocol import Download, Head, Rows, Stage, Upload, shared
from tests.federated.conftest import same
from tests.federated.deploy.conftest import Make
from tests.federated.deploy.test_server import METHODS

STAGE = Stage("root", 3, "root")
ERRAND = Errand(run="0123456789abcdef", purpose="training", number=2, stage=STAGE, round=2)
ONE = torch.tensor([0])


def table(rows: int, r: int = 2, seed: int = 0) -> AdapterTable:
    """Adapters of projections of two shapes."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return AdapterTable([draw(rows, 3, r, 5), draw(rows, 1, r, 4)], [draw(rows, 3, 6, r), draw(rows, 1, 7, r)])


def head(rows: int) -> Head:
    return Head(torch.randn(rows, 4, 8), torch.randn(rows, 4))


LAYOUT = Layout({"root": table(1), "cluster": table(1), "leaf": table(1)}, head(1))


def same_rows(one: Any, other: Any) -> bool:
    """Whether one client has the same rows, as many to choose from, and none where it has none."""
    if one is None or other is None:
        return one is other
    if one.slot.shape != other.slot.shape or not torch.equal(one.slot >= 0, other.slot >= 0):
        return False
    there = one.slot.flatten() >= 0
    return same(one.table.rows(one.slot.flatten()[there]), other.table.rows(other.slot.flatten()[there]))


def equal(one: Download, other: Download) -> bool:
    alike = (one.stage, one.round, one.tiers.keys()) == (other.stage, other.round, other.tiers.keys())
    return (
        alike
        and all(same_rows(rows, other.tiers[tier]) for tier, rows in one.tiers.items())
        and same_rows(one.head, other.head)
    )


def weight(message: Order | Done) -> int:
    """Bytes of the tensors in a message, without those that say which projections an adapter has."""
    tensors = [*message.parts.values()] if isinstance(message, Order) else [*message.tiers.values(), message.head or {}]
    return sum(value.nbytes for named in tensors for name, value in named.items() if not name.endswith(".has"))


@pytest.mark.parametrize("method", METHODS)
def test_every_message_of_a_method_arrives_as_it_was_and_weighs_what_is_counted(
    world: Make, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    sent: list[Any] = []
    checked = {"down": 0, "up": 0}

    def ordering(download: Download, errand: Errand, held: Any) -> Order:
        message = order(download, errand, held)
        sent.append(download)
        if not held or not any(held.values()):
            assert weight(message) == sum(int(part.nbytes()) for part in download.parts())
        checked["down"] += weight(message)
        return message

    def arriving(message: Order, parts: Any) -> Download:
        found = downloaded(message, parts)
        assert any(equal(found, download) for download in sent)
        return found

    def uploading(upload: Upload, errand: Errand) -> Done:
        message = done(upload, errand)
        more = sum(value.nbytes for value in (upload.choice, upload.scores) if value is not None)
        assert weight(message) + more == int(upload.nbytes())
        checked["up"] += weight(message) + more
        back = uploaded(of_bytes(to_bytes(message), Done), upload)
        assert (int(back.clients), int(back.images)) == (int(upload.clients), int(upload.images))
        assert all(same(back.tiers[tier], rows) for tier, rows in upload.tiers.items())
        return message

    monkeypatch.setattr(server, "order", ordering)
    monkeypatch.setattr(member, "downloaded", arriving)
    monkeypatch.setattr(member, "done", uploading)
    there = world(strategy=method, rounds="1,1,1", images_per_client=5, test_images=3)
    there.run()
    assert there.last.post.up.sum() == checked["up"]
    if all(type(download) is Download for download in sent):  # else it is counted as something else
        assert there.last.post.down.sum() == checked["down"]


def roundtrip(download: Download, held: dict[str, Any] | None = None) -> tuple[Order, Download | list[str]]:
    known = {name: part for name, (_, part) in (held or {}).items()}
    message = of_bytes(to_bytes(order(download, ERRAND, known)), Order)
    parts, lacking = received(message, LAYOUT, {name: row for name, (row, _) in (held or {}).items()})
    return message, lacking or downloaded(message, parts)


DOWNLOADS = {
    "nothing": Download(STAGE),
    "a tier and a head": Download(STAGE, {"root": shared(table(1), ONE)}, shared(head(1), ONE)),
    "A alone": Download(STAGE, {"leaf": shared(table(1).only("A"), ONE)}),
    "B alone": Download(STAGE, {"leaf": shared(table(1).only("B"), ONE)}),
    "one of a table": Download(STAGE, {"cluster": Rows(table(5), torch.tensor([3]))}),
    "none of a table": Download(STAGE, {"cluster": Rows(table(5), torch.tensor([-1]))}, shared(head(1), ONE)),
    "several": Download(
        STAGE, {"root": Rows(table(3), torch.tensor([[0, 1, 2]]))}, Rows(head(3), torch.tensor([[0, 1, 2]]))
    ),
    "one of one": Download(STAGE, {"root": Rows(table(1), torch.tensor([[0]]))}, Rows(head(1), torch.tensor([[0]]))),
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_downloads_of_all_kinds_arrive(name: str) -> None:
    download = DOWNLOADS[name].at(2)
    message, found = roundtrip(download)
    assert isinstance(found, Download)
    assert equal(found, download)
    assert weight(message) == int(download.nbytes().sum())


def test_adapters_travel_at_the_rank_that_they_have() -> None:
    low = table(1)
    low = AdapterTable([A.clone() for A in low.A], [B.clone() for B in low.B], torch.tensor([1]))
    for A, B in low.factors:
        A[:, :, 1:], B[..., 1:] = 0, 0
    sent = written(low)
    assert sum(value.nbytes for value in sent.values()) == int(low.nbytes())
    assert same(read(sent, table(1), "root"), low)


def test_adapters_with_scales_of_their_own_are_refused_where_they_would_be_sent() -> None:
    scaled = table(1).scaled(torch.tensor([2.0]))
    with pytest.raises(MessageError, match=r"put them into B, by with_scale_in_B\(\)"):
        order(Download(STAGE, {"root": shared(scaled, ONE)}, None), ERRAND, {})


def test_what_a_client_holds_is_not_sent_and_what_it_lost_is_asked_for() -> None:
    download = DOWNLOADS["a tier and a head"]
    message, _ = roundtrip(download)
    parts, _ = received(message, LAYOUT, {})
    held = {"root.A.0": message.tiers["root"]["A"][0], "head.0": (message.head or [0])[0]}
    again = of_bytes(to_bytes(order(download, ERRAND, held)), Order)
    assert list(again.parts) == ["root.B.0"]
    found, lacking = received(again, LAYOUT, parts)
    assert (lacking, equal(downloaded(again, found), download.at(2))) == ([], True)
    _, lacking = received(again, LAYOUT, {"head.0": parts["head.0"]})
    assert lacking == ["root.A.0"]
    _, lacking = received(again, LAYOUT, {**parts, "root.A.0": table(1, seed=1).only("A")})  # an older one
    assert lacking == ["root.A.0"]


def test_uploads_of_several_clients_become_one() -> None:
    whole = Upload(torch.tensor([4, 7]), torch.tensor([10, 3]), {"root": table(2)}, head(2), torch.tensor([1, 0]))
    one_by_one = [whole.rows(torch.tensor([place])) for place in range(2)]
    messages = [of_bytes(to_bytes(done(upload, ERRAND)), Done) for upload in one_by_one]
    back = together([uploaded(message, one_by_one[0]) for message in messages])
    assert torch.equal(back.clients, whole.clients)
    assert torch.equal(back.images, whole.images)
    assert back.choice is not None
    assert back.choice.tolist() == [1, 0]
    assert same(back.tiers["root"], whole.tiers["root"])
    assert back.head is not None
    assert whole.head is not None
    assert same(back.head, whole.head)


def changed(**change: Any) -> bytes:
    return packed({**order(DOWNLOADS["a tier and a head"], ERRAND, {}).model_dump(), **change})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (changed(parts={}), "lacks"),
        (changed(tiers={"trunk": {"A": [1]}}, head=None, parts={}), "there is no part 'trunk.A.0'"),
        (changed(tiers={"root": {"C": [1]}}), "tiers.root.C"),
        (changed(tiers={"root": {}}, head=None, parts={}), "tier root has neither A nor B"),
        (changed(head=None), "parts head.0 came without a digest"),
        (changed(head=[5]), "head.0 is damaged: its digest is not what the message says"),
        (changed(head=[1.5]), "head.0: Input should be a valid integer"),
        (changed(errand={}), "errand.run: Field required"),
        (changed(errand={**ERRAND.model_dump(), "run": "../../../home"}), "errand.run: String should match pattern"),
        (to_bytes(Hello()), "a message is 'hello', expected order"),
        (packed({}), "a message is None, expected order"),
        (packed({"kind": "order"}), "errand: Field required"),
    ],
)
def test_an_order_that_is_not_as_it_should_be_is_refused(data: bytes, said: str) -> None:
    if said == "lacks":
        assert received(of_bytes(data, Order), LAYOUT, {})[1] == ["root.A.0", "root.B.0", "head.0"]
        return

    def take() -> Download:
        message = of_bytes(data, Order)
        return downloaded(message, received(message, LAYOUT, {})[0])

    with pytest.raises(MessageError) as caught:
        take()
    assert said in str(caught.value)


def forged(tree: str) -> bytes:
    """A file whose checksum is right, whatever its tree."""
    tensors = {"0": torch.zeros(2)}
    about = {"format": FORMAT, "checksum": checksum(tree, tensors), "tree": tree}
    return save(tensors, {"hilora": json.dumps(about)})


@pytest.mark.parametrize(
    "tree",
    [
        "[]",
        "3",
        "null",
        '{"a tensor": "1"}',
        '{"a tensor": []}',
        '{"a stack": "adapters", "tensors": {"0.lora_A": {"a tensor": "0"}}}',
    ]
    + [
        '{"a stack": "pickle", "tensors": {}}',
        '{"a stack": "head", "tensors": 3}',
        "[" * 5000 + "]" * 5000,
        '{"kind": {}}',
    ],
)
def test_no_forged_file_gets_further_than_a_message_error(tree: str) -> None:
    with pytest.raises(MessageError):
        of_bytes(forged(tree), Done, Present)


def test_no_damaged_message_gets_further_than_a_message_error(tmp_path: Path) -> None:
    whole = to_bytes(done(Upload(ONE, ONE, {"root": table(1)}, head(1)), ERRAND))
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        data = bytearray(whole)
        for place in torch.randint(0, 1200, (3,), generator=generator).tolist():
            data[place] = int(torch.randint(0, 256, (1,), generator=generator))
        cut = int(torch.randint(0, len(data), (1,), generator=generator)) if data[0] % 2 else len(data)
        if bytes(data[:cut]) != whole:
            with pytest.raises(MessageError):
                uploaded(of_bytes(bytes(data[:cut]), Done), Upload(ONE, ONE, {"root": table(1)}, head(1)))
