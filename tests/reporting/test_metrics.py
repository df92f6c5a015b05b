"""Accuracies over clients, the log of rounds, and files that are whole or not there."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from hilora.reporting.metrics import MetricsLog, summarise, write_bytes, write_json


@pytest.mark.parametrize(("n", "worst"), [(1, 1), (9, 1), (10, 1), (11, 2), (25, 3), (30, 3), (100, 10)])
def test_tail_is_the_mean_of_the_worst_tenth_rounded_up(n, worst):
    values = torch.linspace(0, 1, n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))]
    expected = values.sort().values[:worst].double().mean().item()
    assert summarise(values)["tail"] == pytest.approx(expected, abs=1e-7)


def test_mean_and_population_std():
    found = summarise(torch.tensor([0.2, 0.4, 0.9]))
    assert found["mean"] == pytest.approx(0.5)
    assert found["std"] == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 3))
    assert all(type(value) is float for value in found.values())


def test_one_client_has_no_spread():
    assert summarise(torch.tensor([0.25])) == {"mean": 0.25, "tail": 0.25, "std": 0.0}


def test_clients_without_test_images_are_left_out():
    nan = float("nan")
    assert summarise(torch.tensor([nan, 0.5, nan, 1.0])) == {"mean": 0.75, "tail": 0.5, "std": 0.25}


@pytest.mark.parametrize("values", [[], [float("nan")] * 3])
def test_nobody_has_test_images(values):
    assert summarise(torch.tensor(values)) == {"mean": None, "tail": None, "std": None}


def test_log_writes_a_line_a_round_and_flushes_it(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"round": 1, "loss": torch.tensor(0.5), "rho": float("nan")})
        assert json.loads(path.read_text()) == {"round": 1, "loss": 0.5, "rho": None}
        log.append({"round": 2, "stage": "root"})
        assert len(path.read_text().splitlines()) == 2
    assert log.records == [{"round": 1, "loss": 0.5, "rho": None}, {"round": 2, "stage": "root"}]


def write_rounds(path: Path, n: int) -> None:
    with MetricsLog(path) as log:
        for i in range(n):
            log.append({"round": i + 1})


def test_resumed_log_keeps_the_first_records_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, 5)
    with MetricsLog(path, keep=3) as log:
        assert log.records == [{"round": 1}, {"round": 2}, {"round": 3}]
        log.append({"round": 4, "again": True})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == log.records == [{"round": 1}, {"round": 2}, {"round": 3}, {"round": 4, "again": True}]


def test_a_new_run_begins_an_empty_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, 2)
    assert MetricsLog(path).records == []
    assert path.read_bytes() == b""


@pytest.mark.parametrize("torn", [b'{"round": 3, "lo', b'{"round": 3}', b'{"name": "caf\xc3', b"\x00\x00\x00", b"7\n"])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, 2)
    with open(path, "ab") as file:
        file.write(torn)
    with MetricsLog(path, keep=9) as log:
        assert log.records == [{"round": 1}, {"round": 2}]
        log.append({"round": 3})
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n{"round": 3}\n'


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\nof today\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl"):
        MetricsLog(path, keep=2)
    assert path.read_text() == "my notes\nof today\n"


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
