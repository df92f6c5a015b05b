"""Arguments made from settings, and settings made from arguments."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from hilora.cli.fields import add_field, described, made
from hilora.cli.methods import chosen, load
from hilora.cli.training import Command
from hilora.errors import InvalidTypeError, InvalidValueError
from hilora.federated.data.partitions import settings
from hilora.federated.settings import Settings, TrainingSettings
from hilora.federated.strategies import STRATEGIES, own_fields
from hilora.federated.strategies.fedit import FedIT

FOREIGN = """
from pydantic import Field
from hilora.federated.settings import Settings
from hilora.federated.strategies.fedit import FedIT

class Mine(FedIT):
    class Settings(Settings):
        boldness: float = Field(0.5, ge=0, description="how bold it is")
    name = "mine"
"""


def command() -> Command:
    return Command("words", "words", lambda data: None, {"rounds": [1, 2, 3]})


def test_every_shared_setting_every_partition_and_every_method_can_be_reached() -> None:
    arguments = ["--strategy", "pf2lora", "--pf2lora.alpha", "0.5", "--alpha", "2", "--rank", "4,2,1", "--augment"]
    args = command().parse(arguments)
    assert (args.rank, args.augment, args.alpha, getattr(args, "pf2lora.alpha")) == ([4, 2, 1], True, 2.0, 0.5)
    parser = command().parser()
    known = {action.dest for action in parser._actions}
    assert set(TrainingSettings.model_fields) <= known
    assert set(settings()) <= known
    for name, kind in STRATEGIES.items():
        assert {f"{name}.{field}" for field in own_fields(kind)} <= known


def test_what_is_not_given_stays_at_its_default_and_the_help_says_it_once(capsys: pytest.CaptureFixture[str]) -> None:
    args = command().parse([])
    assert args.rounds == [1, 2, 3]
    assert not hasattr(args, "batch_size")
    with pytest.raises(SystemExit):
        command().parse(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "trains it for all of them (1,2,3)" in said
    assert "images of one client in a step (16)" in said
    assert "ifca: number of global adapters (5)" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--strategy", "fedti"], "fedti: there are"),
        (["--strategy", "fedit", "fedit"], "names one twice"),
        (["--rank", "4,2"], "has 2"),
        (["--schedule", "square"], "invalid choice"),
        (["--strategy", "no.such:Thing"], "no.such:Thing cannot be loaded"),
    ],
)
def test_a_mistake_ends_with_what_was_expected(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command().parse(arguments)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_errors_of_values_name_the_flag() -> None:
    with pytest.raises(InvalidValueError, match=r"--batch-size=0: .*greater than or equal to 1"):
        made(TrainingSettings, {"batch_size": 0})
    with pytest.raises(InvalidValueError, match=r"--lr\.leaf=-1"):
        made(TrainingSettings, {"lr": [1, 1, -1]})


def test_settings_named_after_tiers_have_one_argument_together_and_what_is_for_fewer_counts_more() -> None:
    args = command().parse(["--gamma", "0.5", "--gamma-cluster", "0.25", "--hilora.k-min", "3", "--k-min", "2"])
    (strategy,) = chosen(args, args.kinds)
    found = strategy.settings.plain()
    assert (found["gamma_root"], found["gamma_cluster"], found["k_min"]) == (0.5, 0.25, 3)


def test_a_method_may_not_have_a_setting_of_the_name_of_a_shared_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Greedy(FedIT):
        class Settings(Settings):
            rank: int = 3

        name = "greedy"

    monkeypatch.setitem(STRATEGIES, "greedy", Greedy)
    with pytest.raises(InvalidValueError, match=r"greedy: rank is what all methods share"):
        command().parse([])


def test_a_method_of_ones_own_is_chosen_by_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_method.py").write_text(FOREIGN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(STRATEGIES, "mine", None)  # taken out again after the test
    del STRATEGIES["mine"]
    args = command().parse(["--strategy", "own_method:Mine", "--boldness", "0.25"])
    assert args.strategy == ["mine"]
    assert args.boldness == 0.25
    with pytest.raises(InvalidTypeError, match="is no strategy"):
        load("own_method:Field")


def test_a_field_describes_itself_and_its_defaults() -> None:
    field = TrainingSettings.model_fields["lr"]
    assert described(field).endswith("(0.003,0.003,0.0003)")
    assert described(field, 1e-2, None).endswith("(0.01 or none)")
    parser = argparse.ArgumentParser()
    add_field(parser.add_argument_group("some"), "clip_norm", TrainingSettings.model_fields["clip_norm"], "help")
    assert parser.parse_args(["--clip-norm", "2"]).clip_norm == 2.0
    assert not hasattr(parser.parse_args([]), "clip_norm")
