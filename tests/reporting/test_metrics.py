"""The log of rounds."""

import json
from pathlib import Path

import pytest
import torch

from hilora.reporting.metrics import MetricsLog


def test_log_writes_a_line_a_round_and_flushes_it(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = MetricsLog(path)
    log.append({"round": 1, "loss": torch.tensor(0.5), "rho": float("nan")})
    assert json.loads(path.read_text()) == {"round": 1, "loss": 0.5, "rho": None}
    log.append({"round": 2, "stage": "root"})
    assert len(path.read_text().splitlines()) == 2
    assert log.records == [{"round": 1, "loss": 0.5, "rho": None}, {"round": 2, "stage": "root"}]


def write_rounds(path: Path, n: int) -> None:
    log = MetricsLog(path)
    for i in range(n):
        log.append({"round": i + 1})


def test_resumed_log_keeps_the_first_records_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rounds(path, 5)
    log = MetricsLog(path, keep=3)
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
    log = MetricsLog(path, keep=9)
    assert log.records == [{"round": 1}, {"round": 2}]
    log.append({"round": 3})
    assert path.read_text() == '{"round": 1}\n{"round": 2}\n{"round": 3}\n'


def test_a_foreign_file_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("my notes\nof today\n")
    with pytest.raises(ValueError, match=r"line 1 of .*metrics\.jsonl"):
        MetricsLog(path, keep=2)
    assert path.read_text() == "my notes\nof today\n"


@pytest.mark.parametrize("content", [None, b"", b'{"round": 1}\n'])
def test_rounds_that_are_lost_are_told(tmp_path, caplog, content):
    path = tmp_path / "metrics.jsonl"
    if content is not None:
        path.write_bytes(content)
    MetricsLog(path, keep=2)
    assert f"{path} has {1 if content else 0} of 2 rounds" in caplog.text
