"""Trees in one file: what comes out is what went in, and no damage goes unnoticed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from hilora.adapters.io.files import checksum
from hilora.adapters.table import AdapterTable, Values
from hilora.errors import FileError, InvalidTypeError
from hilora.federated.archive import packed, unpacked
from hilora.federated.protocol import Head

TREE: dict[str, Any] = {
    "number": 1,
    "list": [1.5, None, {"ids": torch.arange(3)}],
    "table": AdapterTable([torch.randn(2, 1, 3, 4)], [torch.randn(2, 1, 5, 3)], torch.tensor([3, 1])),
    "heads": {"root": Head(torch.ones(1, 2, 3), torch.zeros(1, 2))},
    "values": Values(**{"gate.0": torch.ones(2, dtype=torch.float64)}),
    "text": "é, \n",
    "empty": torch.empty(0, 2),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "tree.safetensors"
    path.write_bytes(packed(TREE))
    return path


def test_what_comes_out_is_what_went_in(path: Path) -> None:
    found = unpacked(path)
    assert list(found) == list(TREE)
    assert (found["number"], found["text"], found["list"][:2]) == (1, "é, \n", [1.5, None])
    assert torch.equal(found["list"][2]["ids"], torch.arange(3))
    assert found["empty"].shape == (0, 2)
    for name in ("table", "values"):
        assert type(found[name]) is type(TREE[name])
        assert {k: v.tolist() for k, v in found[name].tensors().items()} == {
            k: v.tolist() for k, v in TREE[name].tensors().items()
        }
    assert found["values"]["gate.0"].dtype == torch.float64
    assert torch.equal(found["heads"]["root"].weight, torch.ones(1, 2, 3))


def test_the_same_tree_gives_the_same_bytes() -> None:
    assert packed(TREE) == packed(TREE)


def test_a_stack_of_another_kind_is_named() -> None:
    class Mine(Values):
        pass

    with pytest.raises(InvalidTypeError, match=r"a Mine cannot be saved: .* Values\(\*\*stack.tensors\(\)\)"):
        packed({"store": {"mine": Mine(number=torch.ones(2))}})


def test_every_flipped_bit_and_every_cut_is_noticed(path: Path) -> None:
    content, draws = path.read_bytes(), random.Random(0)
    damaged = []
    for _ in range(150):
        flipped = bytearray(content)
        flipped[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        damaged.append(bytes(flipped))
    damaged += [content[: draws.randrange(len(content))] for _ in range(30)]
    for one in damaged:
        path.write_bytes(one)
        with pytest.raises(FileError, match=path.name):
            unpacked(path)


def test_a_foreign_file_is_named(path: Path) -> None:
    save_file({"x": torch.ones(1)}, path)
    with pytest.raises(FileError, match="is no file of a run"):
        unpacked(path)


def test_a_digest_tells_what_a_sum_does_not() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    assert checksum("", {"a": a, "b": b}) == checksum("", {"b": b.clone(), "a": a.clone()})
    assert checksum("", {"a": a, "b": b}) != checksum("", {"a": b, "b": a})
    assert checksum("", {"a": a}) != checksum("", {"a": a.double()})
    assert checksum("", {"a": a}) != checksum("", {"a": a.view(2, 1)})
