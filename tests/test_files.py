"""Files that are whole or not there, and files of JSON lines."""

import json
import math
import os
import stat
from pathlib import Path

import pytest
import torch

from hilora.errors import InvalidValueError
from hilora.files import append_line, atomic, read_lines, set_aside, write_bytes, write_json


def test_json_has_no_nan_and_takes_tensors_and_paths(tmp_path):
    path = tmp_path / "new" / "summary.json"
    content = {"nan": float("nan"), "inf": [1.0, -math.inf], "labels": torch.tensor([0, 2]), 3: (None, True), "p": path}
    write_json(path, content)
    expected = {"nan": None, "inf": [1.0, None], "labels": [0, 2], "3": [None, True], "p": str(path)}
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == expected


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_failed_replacement_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"old": 1})

    def fail(source, target):
        assert os.path.dirname(source) == os.path.dirname(target)
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_bytes(path, b"new")
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_an_error_while_writing_leaves_neither_file_nor_folder(tmp_path):
    def interrupted(path: Path) -> None:
        with atomic(path) as temporary:
            temporary.write_bytes(b"half")
            assert not path.exists()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    for path in (tmp_path / "there" / "a", tmp_path / "new" / "newer" / "a"):
        with pytest.raises(KeyboardInterrupt):
            interrupted(path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_what_another_one_put_into_a_new_folder_stays(tmp_path):
    def fails() -> None:
        with atomic(tmp_path / "new" / "a"):
            (tmp_path / "new" / "b").touch()
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fails()
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "b"]


@pytest.mark.parametrize("name", ["there", "there/", "new/"])
def test_a_folder_is_no_file(tmp_path, name):
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidValueError, match="is a folder, expected a file"):
        write_bytes(f"{tmp_path}/{name}", b"")
    assert os.listdir(tmp_path) == ["there"]


def test_permissions_are_those_of_the_umask_or_of_the_file_that_was_there(tmp_path):
    before = os.umask(0o027)
    try:
        write_bytes(tmp_path / "new", b"1")
        write_bytes(tmp_path / "old", b"1")
        (tmp_path / "old").chmod(0o444)
        write_bytes(tmp_path / "old", b"2")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {"new": 0o640, "old": 0o444}
    assert (tmp_path / "old").read_bytes() == b"2"


def test_a_file_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    order: list[object] = []
    sync, replace = os.fsync, os.replace

    def synced(file: int) -> None:
        order.append(os.fstat(file).st_size)
        sync(file)

    def replaced(source: Path, target: Path) -> None:
        order.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_bytes(tmp_path / "a", b"123")
    assert order[:2] == [3, "replace"]
    assert len(order) == 3


def test_lines_are_appended_after_what_was_cut_off(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    append_line(path, {"a": float("nan")})
    with open(path, "ab") as file:
        file.write(b'{"b": "\xc3')
    append_line(path, {"c": torch.tensor([1])})
    assert [line.record for line in read_lines(path)] == [{"a": None}, None, {"c": [1]}]
    assert b"".join(line.text for line in read_lines(path)) == path.read_bytes()


@pytest.mark.parametrize("text", [b"", b"3\n", b"[" * 100_000, b"\xff\n", b"null\n"])
def test_what_is_no_record(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    assert all(line.record is None for line in read_lines(tmp_path / "a"))
    assert read_lines(tmp_path / "none") == []


def test_only_what_is_named_is_set_aside(tmp_path):
    for round in (1, 2):
        (tmp_path / "a").write_text(str(round))
        (tmp_path / "mine").touch()
        set_aside(tmp_path, ["a", "b"])
    set_aside(tmp_path, ["a", "b"])
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == [
        "earlier-1/a",
        "earlier-2/a",
        "mine",
    ]
    assert Path(tmp_path, "earlier-2", "a").read_text() == "2"


def test_what_is_no_text_in_a_path_is_escaped(tmp_path):
    odd = os.fsdecode(b"r\xe9sultats")
    for name in ("summary.json", "lines.jsonl"):
        path = tmp_path / odd / name
        (write_json if name == "summary.json" else append_line)(path, {"out": path})
        assert json.loads(path.read_bytes()) == {"out": str(path)}


def test_an_error_of_the_system_names_the_file(tmp_path, monkeypatch):
    def full(self, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*/summary\.json'"):
        write_json(tmp_path / "summary.json", {})
    assert not list(tmp_path.iterdir())
