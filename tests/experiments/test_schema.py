"""Versions of the ledger's schema: their defaults, and lines of the first one."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from typing import Any

import pytest

from hilora.experiments import schema
from hilora.experiments.experiment import Model
from hilora.experiments.identity import decisive, fingerprint
from hilora.experiments.schema import DEFAULTS, SCHEMA, upgrade, upgraded_line
from hilora.federated.data.partitions import PARTITIONS
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import STRATEGIES

RUN: dict[str, Any] = {
    "rounds": {"root": 3, "cluster": 6, "leaf": 3},
    "lr": {"root": 0.006, "cluster": 0.006, "leaf": 0.006},
    "rank": {"root": 8, "cluster": 8, "leaf": 2},
    "lora_alpha": {"root": 16, "cluster": 16, "leaf": 4.0},
    "options": {"rank": 2, "alpha": 0.001},
    "seed": 5,
    "cohort_size": 4,
}
LINE: dict[str, Any] = {
    "key": {"setting": "a", "method": "b", "overrides": {"lr": 0.006, "options": {"alpha": 0.001, "rank": 2}}},
    "fingerprint": "0123",
    "decides": {
        "strategy": "pf2lora",
        "run": RUN,
        "partition": {"clients": 20, "scheme": "gl-dir", "seed": 5, "alpha": None, "superclasses": 3},
        "data": "cifar",
        "model": {"backbone": "vit", "dtype": "auto"},
    },
    "results": {"final": {"mean": 0.5}},
    "dtype": "bfloat16",
}


def current() -> dict[str, Any]:
    """The defaults of the code as it is."""
    run = TrainingSettings()
    return {
        "strategies": {name: decisive(kind(), run) for name, kind in STRATEGIES.items()},
        "partitions": {
            name: {setting: field.default for setting, field in kind.model_fields.items() if not field.is_required()}
            for name, kind in PARTITIONS.items()
        },
        "model": {name: value for name, value in asdict(Model("")).items() if name != "backbone"},
    }


def test_the_newest_version_has_the_defaults_of_the_code() -> None:
    """Whoever changes one adds a version to `defaults.json`; a new method or partition needs none."""
    now = json.loads(json.dumps(current()))
    known = DEFAULTS[SCHEMA]
    asked = f"add to defaults.json, version {SCHEMA + 1}: {json.dumps(now)}"
    assert known["model"] == now["model"], asked
    for kinds in ("strategies", "partitions"):
        for name, defaults in known[kinds].items():
            assert now[kinds].get(name) == defaults, asked


def test_a_line_of_the_first_version_says_what_its_method_and_partition_have() -> None:
    found = upgrade(LINE["decides"])
    assert (found["schema"], found["strategy"], found["data"]) == (2, "pf2lora", "cifar")
    settings = found["settings"]
    assert settings["rank"] == {"root": 8, "leaf": 2}, "of the tiers that it has"
    assert settings["lora_alpha"] == {"root": 16, "leaf": 4.0}
    assert (settings["own_rank"], settings["alpha"], settings["shared_head"]) == (2, 0.001, False)
    assert (settings["batch_size"], settings["seed"]) == (16, 5), "what was left unsaid stood at its default"
    assert not {"gamma_root", "published", "options", "cohort_size"} & set(settings)
    partition = found["partition"]
    assert (partition["alpha"], partition["scheme"], partition["seed"]) == (0.3, "gl-dir", 5)
    assert "superclasses" not in partition
    assert upgrade(found) == found


def test_the_first_version_wrote_truth_as_a_number() -> None:
    decides = copy.deepcopy(LINE["decides"])
    decides["run"]["options"]["shared_head"] = 1
    assert upgrade(decides)["settings"]["shared_head"] is True


def test_a_method_that_is_not_known_keeps_what_it_had() -> None:
    decides = {**LINE["decides"], "strategy": "of-a-stranger"}
    settings = upgrade(decides)["settings"]
    assert settings["alpha"] == 0.001
    assert fingerprint(decides) != fingerprint(LINE["decides"])


def test_a_line_is_upgraded_with_its_name_and_keeps_its_results() -> None:
    before = copy.deepcopy(LINE)
    found = upgraded_line(LINE)
    assert before == LINE, "the line itself is left alone"
    assert found["key"] == {"setting": "a", "method": "b", "overrides": {"lr": 0.006, "alpha": 0.001, "own_rank": 2}}
    assert found["results"] == LINE["results"]
    assert found["decides"]["model"]["dtype"] == "bfloat16", "auto is what was chosen"
    assert "fingerprint" not in found
    assert upgraded_line(found) == found


def test_what_is_left_unsaid_stands_at_the_default_of_the_lines_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """A later version has another default and a setting more: it reads older lines as they were meant."""
    line = {"schema": 2, "strategy": "fedit", "settings": {}, "partition": {"scheme": "patho"}, "model": {}}
    whole = {**line, "settings": DEFAULTS[2]["strategies"]["fedit"]}
    assert fingerprint(line) == fingerprint(whole)
    later = copy.deepcopy(dict(DEFAULTS[2]))
    later["strategies"]["fedit"] |= {"batch_size": 99, "proximity": 0.0}
    again = copy.deepcopy(later)
    again["strategies"]["fedit"]["proximity"] = 0.5
    monkeypatch.setattr(schema, "DEFAULTS", {**DEFAULTS, 3: later, 4: again})
    monkeypatch.setattr(schema, "SCHEMA", 4)
    new = {**whole, "schema": 4, "settings": {**whole["settings"], "proximity": 0.0}}
    assert fingerprint(line) == fingerprint(whole) == fingerprint(new)
    assert fingerprint(new) != fingerprint({**new, "settings": {**new["settings"], "batch_size": 99}})
    assert fingerprint({**line, "schema": 3}) != fingerprint(line)
