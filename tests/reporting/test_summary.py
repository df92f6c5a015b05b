"""The one schema of results."""

import json
from pathlib import Path

import pytest
import torch

from hilora.errors import FileError, InvalidValueError, MissingFileError
from hilora.reporting.summary import SCHEMA, read_summary, write_summary
from tests.reporting.test_comparison import FEDIT, make_summary

OLD = sorted(Path(__file__).parents[2].glob("benchmarks/results/*/*.json"))


def test_a_summary_says_its_schema_and_is_read_as_written(tmp_path):
    bytes_of_each = {"up": [10.0, None], "down": torch.tensor([4, 4])}
    given = make_summary(
        communication={"up": 2.5, "down": 4, "per_client": bytes_of_each},
        per_client={"ids": [0, 3], "test": [0.5, float("nan")]},
        diagnostics={"leaf": {"train_loss": 1.0, "overlap": {"root": 0.1}, "label_distance": None}},
        config={"rounds": (1, 2), "options": {"a": [True, "b"]}},
    )
    write_summary(tmp_path / "summary.json", given)
    found = read_summary(tmp_path / "summary.json")
    assert next(iter(json.loads((tmp_path / "summary.json").read_text()).items())) == ("schema", SCHEMA)
    assert found["communication"]["per_client"] == {"up": [10.0, None], "down": [4, 4]}
    assert found["per_client"]["test"] == [0.5, None]
    assert found["config"]["rounds"] == [1, 2]
    write_summary(tmp_path / "again.json", FEDIT)
    assert read_summary(tmp_path / "again.json")["final"] == {"mean": 0.7, "tail": None, "std": None}


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_summaries_of_earlier_versions_are_read(path):
    found = read_summary(path)
    assert "schema" not in found
    assert found == json.loads(path.read_text())


def test_there_are_summaries_of_earlier_versions():
    assert OLD


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"final": 0.5}, "final is 0.5"),
        ({"final": {"mean": 0.5, "tail": None}}, "final.std is .*required"),
        ({"final": {"mean": "0.5", "tail": None, "std": None}}, "final.mean is '0.5'"),
        ({"tiers": {"root": {"mean": True, "tail": None, "std": None}}}, "tiers.root.mean is True"),
        ({"seed": "0"}, "seed is '0'"),
        ({"clusters": {"k": 2, "ari": None}}, "clusters.labels is"),
        ({"communication": {"up": 1}}, "communication.down is"),
        ({"communication": {"up": 1, "down": 1, "per_client": [1]}}, "communication.per_client is"),
        ({"strategy": None}, "strategy is None"),
        ({"seconds_by_phase": {"train": 1.0}}, "seconds_by_phase.evaluate is"),
        ({"per_client_by_tier": {"root": ["0.5"]}}, "per_client_by_tier.root.0 is '0.5'"),
    ],
)
def test_what_departs_from_the_schema_is_named(tmp_path, change, said):
    with pytest.raises(InvalidValueError, match=said):
        write_summary(tmp_path / "new" / "summary.json", make_summary(**change))
    assert not (tmp_path / "new").exists()
    (tmp_path / "summary.json").write_text(json.dumps(make_summary(**change)))
    with pytest.raises(FileError, match=said):
        read_summary(tmp_path / "summary.json")


def test_files_that_do_not_serve(tmp_path):
    with pytest.raises(MissingFileError, match="no summary"):
        read_summary(tmp_path / "none.json")
    for text in ("{", "[]", "null", "\xff"):
        (tmp_path / "a.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(FileError, match=r"is no(t JSON| summary of a run)"):
            read_summary(tmp_path / "a.json")
    (tmp_path / "a.json").write_text(json.dumps({"schema": SCHEMA + 1}))
    with pytest.raises(FileError, match="update hilora"):
        read_summary(tmp_path / "a.json")
