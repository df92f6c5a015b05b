"""The ledgers that are in the repository: all that was trained is found, as what it was trained for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hilora.experiments.identity import fingerprint
from hilora.experiments.ledger import Ledger, migrate
from hilora.experiments.plan import final_jobs, tuning_jobs
from hilora.experiments.records import is_record
from hilora.experiments.schema import SCHEMA
from hilora.experiments.spec import read_experiment

FOLDER = Path(__file__).parents[2] / "benchmarks" / "experiments"
COUNTS = {"methods": (579, 203), "ablations": (94, 94), "more_images": (16, 16), "more_clients": (10, 10)}
COUNTS |= {"shared_heads": (30, 12), "unequal": (219, 72)}
"""Lines, and final runs among them that the experiment asks for."""

FIRST_SCHEMA: dict[str, Any] = {
    "strategy": "fedsa-lora",
    "run": {
        "rounds": {"root": 3, "cluster": 6, "leaf": 3},
        "lr": {"root": 0.006, "cluster": 0.006, "leaf": 0.006},
        "head_lr": {"root": 0.02, "cluster": 0.02, "leaf": 0.02},
        "rank": {"root": 8, "cluster": 8, "leaf": 8},
        "lora_alpha": {"root": 16, "cluster": 16, "leaf": 16},
        "batch_size": 8,
        "gamma_root": 0.0,  # of HiLoRA; it decided nothing here
        "gamma_cluster": 0.0,
        "evaluate_every": 0,
        "options": {"shared_head": 1},
        "seed": 0,
        "cohort_size": None,
    },
    "partition": {
        "scheme": "gl-dir",
        "seed": 0,
        "clients": 20,
        "images_per_client": 64,
        "test_images": 80,
        "alpha": None,
        "classes_per_client": 10,  # of another partition
    },
    "data": "cifar-100-binary",
    "model": {
        "backbone": "deit_tiny_patch16_224",
        "weights": "deit_tiny_patch16_224.safetensors",
        "img_size": 96,
        "dtype": "bfloat16",
    },
}
"""What decided a final run of `shared_heads`, as it was written first; without some of what stood at its default."""


def test_they_are_all_there_are() -> None:
    assert {path.name.removesuffix(".ledger.jsonl") for path in FOLDER.glob("*.ledger.jsonl")} == set(COUNTS)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.toml")), ids=lambda path: path.stem)
def test_every_experiment_can_be_read_and_searches_all_methods_alike(path: Path) -> None:
    experiment = read_experiment(path)
    assert len({len(method.grid) for method in experiment.methods.values()}) == 1
    jobs = [tuning_jobs(experiment, setting, method) for setting, method in experiment.pairs]
    assert all(len(found) == len(method.grid) for found, (_, method) in zip(jobs, experiment.pairs, strict=True))


@pytest.mark.parametrize("name", COUNTS)
def test_no_line_is_lost(name: str, tmp_path: Path) -> None:
    path = FOLDER / f"{name}.ledger.jsonl"
    written = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    assert all(is_record(line) and line["decides"]["schema"] == SCHEMA for line in written)
    ledger = Ledger(path)
    assert ledger.torn == []
    assert ledger.lines == written
    assert len(ledger) == len(written) == COUNTS[name][0]  # none has the identity of another
    assert all(ledger.find(fingerprint(line["decides"])) is line for line in ledger.lines)
    copy = Path(shutil.copy(path, tmp_path / "copy.jsonl"))
    assert migrate(copy) == 0
    assert copy.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", COUNTS)
def test_what_the_experiment_asks_for_is_found_as_what_it_is(name: str) -> None:
    experiment = read_experiment(FOLDER / f"{name}.toml")
    ledger = Ledger(FOLDER / f"{name}.ledger.jsonl")
    finals = [job for pair in experiment.pairs for job in final_jobs(experiment, ledger, *pair)]
    assert len(finals) == sum(len(setting.seeds) for setting, _ in experiment.pairs) == COUNTS[name][1]
    tuning = [job for pair in experiment.pairs for job in tuning_jobs(experiment, *pair)]
    for job in (*finals, *tuning):
        line = ledger.find(job.fingerprint)
        assert line is not None, job.title
        called = {key: line["key"][key] for key in ("setting", "purpose", "seed")}
        assert called == {"setting": job.setting.name, "purpose": job.purpose, "seed": job.seed}
        assert (line["decides"]["strategy"], line["key"]["overrides"]) == (job.method.strategy, job.point), job.title


def test_a_line_of_the_first_schema_is_the_run_that_it_was() -> None:
    experiment = read_experiment(FOLDER / "shared_heads.toml")
    ledger = Ledger(FOLDER / "shared_heads.ledger.jsonl")
    pair = experiment.settings["gl-dir"], experiment.methods["fedsa-lora"]
    asked = final_jobs(experiment, ledger, *pair)[0]
    assert fingerprint(FIRST_SCHEMA) == asked.fingerprint
    found = ledger.find(asked.fingerprint)
    assert found is not None
    assert fingerprint(found["decides"]) == asked.fingerprint
    own_heads = {**FIRST_SCHEMA, "run": {**FIRST_SCHEMA["run"], "options": {}}}
    assert fingerprint(own_heads) != asked.fingerprint
