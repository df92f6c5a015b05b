"""The ledger: appended whole, read with patience."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hilora.experiments.ledger import Ledger, migrate
from hilora.experiments.plan import FINAL, Job, job
from hilora.experiments.schema import SCHEMA
from tests.experiments.conftest import Write, line


@pytest.fixture
def jobs(write: Write) -> list[Job]:
    experiment = write()
    setting, method = experiment.settings["groups"], experiment.methods["hilora"]
    return [job(experiment, setting, method, seed, FINAL, {}) for seed in range(3)]


def test_a_line_is_found_by_what_decided_it_in_this_process_and_the_next(tmp_path: Path, jobs: list[Job]) -> None:
    ledger = Ledger(tmp_path / "results" / "a.jsonl")
    assert ledger.find(jobs[0].fingerprint) is None
    ledger.append(line(jobs[0], test=0.25))
    for one in (ledger, Ledger(ledger.path)):
        found = one.find(jobs[0].fingerprint)
        assert found is not None
        assert found["results"]["final"]["mean"] == 0.25
        assert one.find(jobs[1].fingerprint) is None


def test_the_newest_of_equal_lines_counts_and_the_older_stays(tmp_path: Path, jobs: list[Job]) -> None:
    ledger = Ledger(tmp_path / "a.jsonl")
    ledger.append(line(jobs[0], test=0.25))
    ledger.append(line(jobs[0], test=0.75))
    again = Ledger(ledger.path)
    found = again.find(jobs[0].fingerprint)
    assert found is not None
    assert found["results"]["final"]["mean"] == 0.75
    assert len(again.lines) == 2


def test_a_torn_line_is_passed_over_and_does_not_swallow_the_next(tmp_path: Path, jobs: list[Job]) -> None:
    path = tmp_path / "a.jsonl"
    ledger = Ledger(path)
    ledger.append(line(jobs[0]))
    ledger.append(line(jobs[1]))
    path.write_bytes(path.read_bytes()[:-40])
    torn = Ledger(path)
    assert torn.torn == [2]
    assert torn.find(jobs[1].fingerprint) is None
    torn.append(line(jobs[2]))
    after = Ledger(path)
    assert after.torn == [2]
    assert after.find(jobs[0].fingerprint) is not None
    assert after.find(jobs[2].fingerprint) is not None


def test_two_processes_append_to_one_file(tmp_path: Path, jobs: list[Job]) -> None:
    first, second = Ledger(tmp_path / "a.jsonl"), Ledger(tmp_path / "a.jsonl")
    first.append(line(jobs[0]))
    second.append(line(jobs[1]))
    first.append(line(jobs[2]))
    assert [one["key"]["seed"] for one in Ledger(first.path).lines] == [0, 1, 2]


def test_what_another_process_appended_is_read(tmp_path: Path, jobs: list[Job]) -> None:
    first, second = Ledger(tmp_path / "a.jsonl"), Ledger(tmp_path / "a.jsonl")
    first.append(line(jobs[0]))
    assert second.find(jobs[0].fingerprint) is None
    second.read()
    assert second.find(jobs[0].fingerprint) is not None
    first.append(line(jobs[1]))
    second.append(line(jobs[2]))
    assert len(second) == len(second.lines) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"date": None},
        {"revision": 3},
        {"decides": {"strategy": "hilora"}},
        {"decides": {"strategy": ["hilora"], "run": {}, "partition": {}, "model": {}}},
        {"decides": {"strategy": "hilora", "run": {"options": 3}, "partition": {}, "model": {}}},
        {"decides": {"strategy": "hilora", "run": {"k_min": 10**400}, "partition": {}, "model": {}}},
        {"decides": {"schema": 1, "strategy": "fedit", "settings": {}, "partition": {}, "model": {}}},
        {"decides": {"schema": True, "strategy": "fedit", "settings": {}, "partition": {}, "model": {}}},
        {"decides": {"schema": SCHEMA + 1, "strategy": "fedit", "settings": {}, "partition": {}, "model": {}}},
        {"decides": {"schema": 2, "strategy": "fedit", "run": {}, "partition": {}, "model": {}}},
        {"decides": {"schema": 2, "strategy": "fedit", "settings": {}, "partition": {"scheme": []}, "model": {}}},
        {"decides": {"strategy": "fedit", "run": {}, "partition": {"scheme": {}}, "model": {}}},
        {"key": {"overrides": 3}},
        {"key": {"overrides": {"options": 3}}},
        {"results": {"final": 0.5}},
        {"results": {"val": {"mean": "0.5"}}},
        {"results": {"val": {"mean": float("nan")}}},
        {"results": {"tiers": {"root": 0.5}}},
        {"results": {"diagnostics": {"root": {"overlap": 0.5}}}},
        {"results": {"diagnostics": {"root": {"train_loss": {}}}}},
        {"results": {"per_client": {"ids": [0, 1], "test": [0.5]}}},
        {"results": {"per_client": {"ids": [0], "test": ["0.5"]}}},
        {"results": {"diverged": True}},
        {"results": {"images": "many"}},
    ],
)
def test_json_of_another_shape_is_passed_over(tmp_path: Path, jobs: list[Job], change: dict[str, Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(line(jobs[0]) | change) + "\n" + json.dumps(line(jobs[1])) + "\n")
    ledger = Ledger(path)
    assert ledger.torn == [1]
    assert len(ledger) == 1


@pytest.mark.parametrize("name", ["date", "revision", "decides", "results", "key"])
def test_a_line_that_lacks_something_is_passed_over(tmp_path: Path, jobs: list[Job], name: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({key: value for key, value in line(jobs[0]).items() if key != name}) + "\n")
    assert Ledger(path).torn == [1]


def test_what_is_no_record_is_named(tmp_path: Path, jobs: list[Job]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('<<<<<<< ours\n{"key": 3}\n' + json.dumps(line(jobs[0])) + "\n")
    assert Ledger(path).torn == [1, 2]
    assert len(Ledger(path).lines) == 1


def test_migration_rewrites_older_lines_and_leaves_all_else_as_it_is(tmp_path: Path, jobs: list[Job]) -> None:
    path, new = tmp_path / "a.jsonl", line(jobs[0])
    old = {
        **line(jobs[1], test=0.75),
        "fingerprint": "0123",
        "key": {"setting": "groups", "overrides": {"lr": 0.1, "options": {"k": 3}}},
        "decides": {
            "strategy": "ifca",
            "run": {"options": {"k": 3}, "cohort_size": 2},
            "partition": {"scheme": "patho", "seed": 0, "clients": 5},
            "data": "glyphs",
            "model": {"backbone": "glyph_vit"},
        },
    }
    texts = [json.dumps(new, indent=None, separators=(",", ":")), "{torn", json.dumps(old), json.dumps(new)[:-9]]
    path.write_text("\n".join(texts))
    before = Ledger(path)
    assert migrate(path) == 1
    after = path.read_text().split("\n")
    assert (after[0], after[1], after[3]) == (texts[0], texts[1], texts[3])
    found = json.loads(after[2])
    assert found["decides"]["schema"] == SCHEMA
    assert (found["decides"]["settings"]["k"], found["decides"]["settings"]["images"]) == (3, 32)
    assert found["key"]["overrides"] == {"lr": 0.1, "k": 3}
    assert found["results"] == old["results"]
    again = Ledger(path)
    assert (again.lines, again.torn, len(again)) == (before.lines, [2, 4], len(before))
    whole = path.read_bytes()
    assert migrate(path) == 0
    assert path.read_bytes() == whole
