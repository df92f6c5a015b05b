from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from hilora import HiLoRAConfig


def test_the_defaults_are_those_of_the_paper_s_reasonable_starts() -> None:
    config = HiLoRAConfig()
    assert config.tiers == ("root", "cluster", "leaf")
    assert config.target_modules == ("q", "v")
    assert [config.rank(tier) for tier in config.tiers] == [8, 8, 8]
    assert [config.scale(tier) for tier in config.tiers] == [2.0, 2.0, 2.0]
    assert [config.slot_count(tier) for tier in config.tiers] == [1, 1, 1]


def test_values_can_differ_by_tier() -> None:
    config = HiLoRAConfig(r={"a": 4, "b": 2}, lora_alpha={"a": 2, "b": 8}, slots={"a": 0, "b": 5}, tiers=("a", "b"))
    assert [(config.rank(t), config.scale(t), config.slot_count(t)) for t in "ab"] == [(4, 0.5, 0), (2, 4.0, 5)]


def test_a_config_does_not_follow_the_mapping_it_was_made_of() -> None:
    ranks = {"root": 1, "cluster": 2, "leaf": 3}
    config = HiLoRAConfig(r=ranks)
    ranks["root"] = 7
    assert config.rank("root") == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": 2.5}, "got 2.5"),
        ({"r": "8"}, "got '8'"),
        ({"r": True}, "got True"),
        ({"r": float("nan")}, "got nan"),
        ({"r": float("inf")}, "got inf"),
        ({"r": [8]}, r"got \[8\]"),
        ({"r": {"root": 8, "cluster": 8, "leaf": 0}}, "r must be a whole number of at least 1, got .*'leaf': 0"),
        ({"r": {"root": 8}}, r"r names the tiers \['root'\], the config has \['cluster', 'leaf', 'root'\]"),
        ({"lora_alpha": {"root": 8, "cluster": 8, "lea": 8}}, "lora_alpha names the tiers"),
        ({"lora_alpha": 0}, "lora_alpha must be a positive number, got 0"),
        ({"lora_alpha": -1}, "got -1"),
        ({"lora_alpha": float("nan")}, "got nan"),
        ({"lora_alpha": float("inf")}, "got inf"),
        ({"slots": -1}, "slots must be a whole number of at least 0, got -1"),
        ({"slots": 1.5}, "got 1.5"),
        ({"lora_dropout": 1.0}, r"lora_dropout must lie in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, "got -0.1"),
        ({"lora_dropout": float("nan")}, "got nan"),
        ({"lora_dropout": "0.1"}, "got '0.1'"),
        ({"target_modules": ()}, r"target_modules must be a tuple of names, at least one, got \(\)"),
        (
            {"target_modules": "*.q"},
            r"target_modules '\*.q' is no regular expression .*a tuple of names",
        ),
        ({"target_modules": (1,)}, r"got \(1,\)"),
        ({"tiers": "root"}, "tiers must be a tuple of names, at least one, got 'root'"),
        ({"tiers": ()}, r"got \(\)"),
        ({"tiers": 3}, "got 3"),
        ({"tiers": ("a", "a")}, r"tiers must be distinct names, got \('a', 'a'\)"),
        ({"tiers": ("my root",)}, "a tier cannot be called 'my root': choose a Python identifier such as 'root'"),
        ({"tiers": ("values",)}, "a tier cannot be called 'values'"),  # a method of nn.ParameterDict
    ],
)
def test_values_out_of_range_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HiLoRAConfig(**fields)


@pytest.mark.parametrize("method", ["rank", "scale", "slot_count"])
def test_a_tier_that_there_is_not_is_named(method: str) -> None:
    with pytest.raises(ValueError, match="unknown tier 'lief': this config has root, cluster, leaf"):
        getattr(HiLoRAConfig(), method)("lief")


@pytest.mark.parametrize(
    "config",
    [
        HiLoRAConfig(),
        HiLoRAConfig(r=np.int64(4), lora_alpha=np.float32(8), lora_dropout=0.1, slots=np.int32(3)),  # type: ignore[arg-type]
        HiLoRAConfig({"a": 4, "b": 2}, {"a": 1, "b": 0.5}, ("fc1", "blocks.0.*"), 0.5, ("a", "b"), {"a": 0, "b": 9}),
        HiLoRAConfig(target_modules=["q"], tiers=["root"]),  # type: ignore[arg-type]
    ],
)
def test_a_config_survives_json(config: HiLoRAConfig) -> None:
    assert HiLoRAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_dictionary_may_lack_fields_but_not_have_unknown_ones() -> None:
    assert HiLoRAConfig.from_dict({"r": 4}) == HiLoRAConfig(r=4)
    with pytest.raises(ValueError, match=r"unknown fields \['rank'\]: made by a newer hilora\?"):
        HiLoRAConfig.from_dict({"rank": 4})
