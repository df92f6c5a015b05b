"""Settings say what is wrong with a value, and are what they say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import Field

from hilora.errors import InvalidValueError
from hilora.federated.settings import TIERS, Number, Settings, TrainingSettings, Whole
from hilora.federated.strategies import STRATEGIES

ALL = [TrainingSettings, *(kind.Settings for kind in STRATEGIES.values())]


@pytest.mark.parametrize("given", [5, [5, 5, 5], (5, 5, 5), {"root": 5, "cluster": 5, "leaf": 5}])
def test_one_value_for_all_tiers_or_one_for_each(given: Any) -> None:
    assert TrainingSettings(rounds=given).rounds == {"root": 5, "cluster": 5, "leaf": 5}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rounds": [1, 2]}, r"rounds=\[1, 2\]: give one value, or one for each of root, cluster, leaf"),
        ({"rank": {"root": 1}}, "rank=.*: give one value, or one for each of root, cluster, leaf"),
        ({"rank": 0}, "rank.root=0: input should be greater than or equal to 1"),
        ({"lr": -1.0}, "lr.root=-1.0"),
        ({"lr": float("nan")}, "lr.root=nan"),
        ({"participation": 0}, "participation=0"),
        ({"participation": 1.5}, "participation=1.5"),
        ({"batch_size": 2.5}, "batch_size=2.5"),
        ({"batch_size": True}, "batch_size=True: expected a number"),
        ({"schedule": "steps"}, "schedule='steps'"),
        ({"target_modules": ()}, "target_modules="),
        ({"magic": 1}, "there is no setting 'magic': expected some of rounds, lr"),
        ({"seed": -1, "local_epochs": 0}, "seed=-1.*; local_epochs=0|local_epochs=0.*; seed=-1"),
    ],
)
def test_what_does_not_fit_is_named_with_what_was_expected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message):
        TrainingSettings(**values)


@pytest.mark.parametrize("kind", ALL)
def test_defaults_fit_are_described_and_go_through_json(kind: type[Settings]) -> None:
    settings = kind()
    assert kind(**json.loads(json.dumps(settings.plain()))) == settings
    assert all(field.description for field in kind.model_fields.values())


@pytest.mark.parametrize("kind", list(STRATEGIES.values()))
def test_a_strategys_settings_are_none_of_those_that_all_share(kind: Any) -> None:
    """Both stand side by side in a summary and on the command line."""
    assert not set(kind.Settings.model_fields) & set(TrainingSettings.model_fields)


def test_settings_do_not_change_but_can_be_changed_into_others() -> None:
    settings = TrainingSettings(seed=3)
    with pytest.raises(Exception, match="frozen"):
        settings.seed = 4  # type: ignore[misc]
    other = settings.changed(batch_size=2)
    assert (other.seed, other.batch_size, settings.batch_size) == (3, 2, 16)
    with pytest.raises(InvalidValueError, match="batch_size=0"):
        settings.changed(batch_size=0)


def test_what_is_not_the_default_is_known() -> None:
    assert TrainingSettings(rounds=[15, 20, 15], lora_alpha=16.0).unusual() == {}
    found = TrainingSettings(rounds=[1, 20, 15], rank=4, seed=0).unusual()
    assert found == {"rounds": {"root": 1, "cluster": 20, "leaf": 15}, "rank": dict.fromkeys(TIERS, 4)}

    class Mine(Settings):
        needed: Whole
        count: Whole = 1

    assert Mine(needed=2, count=1).unusual() == {"needed": 2}


def test_settings_of_ones_own() -> None:
    class Mine(Settings):
        share: Number = Field(0.5, ge=0, le=1)
        count: Whole = 1

    assert Mine(share=1).plain() == {"share": 1.0, "count": 1}
    with pytest.raises(InvalidValueError, match="there is no setting 'shares': expected some of share, count"):
        Mine(**{"shares": 1})
