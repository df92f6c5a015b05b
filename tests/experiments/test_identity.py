"""Runs are the same run where what decides their results is the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hilora.experiments.experiment import Experiment
from hilora.experiments.identity import fingerprint
from hilora.experiments.plan import FINAL, TUNING, Job, job
from tests.experiments.conftest import Write


def final(experiment: Experiment, method: str = "hilora", seed: int = 0) -> Job:
    return job(experiment, experiment.settings["groups"], experiment.methods[method], seed, FINAL, {})


def test_it_stays_the_same_where_nothing_decisive_changes(write: Write) -> None:
    plain = final(write()).fingerprint
    assert final(write(("rank = 2", "rank = [2.0, 2, 2]"))).fingerprint == plain
    assert final(write(("rank = 2", "rank = 2\nclients_at_once = 3"))).fingerprint == plain
    assert final(write(("rank = 2", "rank = 2\nk_min = 1"))).fingerprint == plain  # the default
    assert final(write(("clients = 5", "clients = 5\nunseen = 0.2"))).fingerprint == plain  # so is this
    assert final(write(("[methods.hilora]", '[methods.named]\nstrategy = "hilora"')), "named").fingerprint == plain
    assert final(write(('title = "Small"', 'title = "Other"'))).fingerprint == plain


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rank = 2", "rank = [2, 2, 3]"),
        ("clients = 5", "clients = 6"),
        ('partition = "sc-dir"', 'partition = "patho"'),
        ('data = "glyphs"', 'data = "cifar"'),
        ('dtype = "float32"', 'dtype = "bfloat16"'),
        ("[methods.hilora]", "[methods.hilora]\nrun = { k_max = 3 }"),
    ],
)
def test_it_changes_with_whatever_decides(write: Write, old: str, new: str) -> None:
    assert final(write()).fingerprint != final(write((old, new))).fingerprint


def test_how_many_classes_are_taken_decides(write: Write) -> None:
    domains = ('partition = "sc-dir"', 'partition = "domains"')
    some = (domains[0], f"{domains[1]}\nclasses = 10")
    assert final(write(domains)).fingerprint != final(write(some)).fingerprint


def test_seeds_strategies_and_cheaper_tuning_tell_runs_apart(tuned: Experiment) -> None:
    method, setting = tuned.methods["hilora"], tuned.settings["groups"]
    jobs = [
        final(tuned),
        final(tuned, seed=1),
        final(tuned, "fedit"),
        job(tuned, setting, method, 0, TUNING, {}),
        job(tuned, setting, method, 0, FINAL, method.grid[1]),
    ]
    assert len({one.fingerprint for one in jobs}) == len(jobs)
    assert jobs[3].decides["partition"]["clients"] == 3


def test_what_a_strategy_does_not_use_decides_nothing(write: Write) -> None:
    heavier = write(("rank = 2", "rank = 2\ngamma_root = 7.0"))
    assert final(heavier, "fedit").fingerprint == final(write(), "fedit").fingerprint
    assert final(heavier, "hilora").fingerprint != final(write(), "hilora").fingerprint
    higher = write(("rank = 2", "rank = [2, 2, 3]"))  # of a tier that FedIT does not have
    assert final(higher, "fedit").fingerprint == final(write(), "fedit").fingerprint


def test_a_line_from_before_a_field_existed_has_its_default(write: Write) -> None:
    decides: dict[str, Any] = copy.deepcopy(dict(final(write()).decides))
    whole = fingerprint(decides)
    del decides["settings"]["batch_size"], decides["partition"]["max_tries"], decides["model"]["img_size"]
    assert fingerprint(decides) != whole  # a batch is not of the default size here
    decides["settings"]["batch_size"] = 4
    assert fingerprint(decides) == whole
    del decides["settings"]["rank"]  # nor is this
    assert fingerprint(decides) != whole


def test_so_has_a_line_from_before_a_strategy_had_a_setting_of_its_own(write: Write) -> None:
    decides: dict[str, Any] = copy.deepcopy(dict(final(write(("fedit", "ifca")), "ifca").decides))
    whole = fingerprint(decides)
    del decides["settings"]["images"]
    assert fingerprint(decides) == whole
    del decides["settings"]["k"]
    assert fingerprint(decides) == whole
    decides["settings"]["k"] = 7
    assert fingerprint(decides) != whole
