"""Which runs there are, and what tuning chooses."""

from __future__ import annotations

from pathlib import Path

import pytest

from hilora.experiments.experiment import Experiment, Method, Setting
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import choose, final_jobs, tuning_jobs
from hilora.experiments.records import DIVERGED
from tests.experiments.conftest import Write, line


@pytest.fixture
def pair(tuned: Experiment) -> tuple[Setting, Method]:
    return tuned.settings["groups"], tuned.methods["hilora"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_without_grids_there_are_final_runs_alone(write: Write, ledger: Ledger) -> None:
    experiment = write()
    setting, method = experiment.pairs[0]
    assert tuning_jobs(experiment, setting, method) == []
    assert [(job.seed, job.purpose, job.run.seed) for job in final_jobs(experiment, ledger, setting, method)] == [
        (0, "final", 0),
        (1, "final", 1),
    ]


def test_validation_chooses_even_where_the_test_says_otherwise(
    tuned: Experiment, pair: tuple[Setting, Method], ledger: Ledger
) -> None:
    first, second = tuning_jobs(tuned, *pair)
    assert (first.seed, first.decides["partition"]["clients"]) == (100, 3)
    ledger.append(line(first, test=0.9, val=0.3))
    assert choose(tuned, ledger, *pair).place is None
    assert final_jobs(tuned, ledger, *pair) == []  # a point is not known yet
    ledger.append(line(second, test=0.1, val=0.4))
    choice = choose(tuned, ledger, *pair)
    assert choice.scores == (0.3, 0.4)
    assert choice.place == 1
    finals = final_jobs(tuned, ledger, *pair)
    assert [job.run.lr["root"] for job in finals] == [1e-3, 1e-3]
    assert [job.decides["partition"]["clients"] for job in finals] == [5, 5]


def test_of_equals_the_first_is_chosen(tuned: Experiment, pair: tuple[Setting, Method], ledger: Ledger) -> None:
    for job in tuning_jobs(tuned, *pair):
        ledger.append(line(job, val=0.5))
    assert choose(tuned, ledger, *pair).place == 0


def test_a_point_that_diverged_loses(tuned: Experiment, pair: tuple[Setting, Method], ledger: Ledger) -> None:
    first, second = tuning_jobs(tuned, *pair)
    ledger.append(line(first) | {"results": {DIVERGED: "not finite"}})
    ledger.append(line(second, val=0.1))
    choice = choose(tuned, ledger, *pair)
    assert choice.place == 1
    assert choice.diverged == {0}
    assert not choice.hopeless
    ledger.append(line(second) | {"results": {DIVERGED: "not finite"}})
    assert choose(tuned, ledger, *pair).place is None
    assert choose(tuned, ledger, *pair).hopeless
    assert final_jobs(tuned, ledger, *pair) == []


def test_tuning_of_one_setting_chooses_for_that_alone(
    tuned: Experiment, pair: tuple[Setting, Method], ledger: Ledger
) -> None:
    for job in tuning_jobs(tuned, *pair):
        ledger.append(line(job))
    assert choose(tuned, ledger, tuned.settings["mixed"], pair[1]).scores == (None, None)
