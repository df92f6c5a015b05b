"""Which runs an experiment needs, in which order, what decides their results, and what tuning chose."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from hilora.experiments.checks import Table
from hilora.experiments.experiment import Experiment, Method, Setting
from hilora.experiments.identity import decisive, fingerprint
from hilora.experiments.ledger import Ledger
from hilora.experiments.records import DIVERGED
from hilora.experiments.schema import SCHEMA
from hilora.federated.data.partitions import Partition
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import Strategy

TUNING, FINAL = "tuning", "final"


@dataclass(frozen=True)
class Job:
    """A run, with all that decides its result.

    Attributes:
        purpose: "tuning" or "final".
        point: the grid point that it is trained with; empty where the method has no grid.
        strategy: the method with its own settings.
        run: how to train.
        partition: how the images are divided.
        decides: the schema's version, and strategy, settings, partition, data and model, as the ledger keeps them; what
            the strategy does not use decides nothing.
    """

    setting: Setting
    method: Method
    seed: int
    purpose: str
    point: Table
    strategy: Strategy
    run: TrainingSettings
    partition: Partition
    decides: Table

    @property
    def key(self) -> dict[str, Any]:
        """What the run is called in the ledger."""
        return {
            "setting": self.setting.name,
            "method": self.method.name,
            "seed": self.seed,
            "purpose": self.purpose,
            "overrides": self.point,
        }

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.decides)

    @property
    def title(self) -> str:
        point = f" {json.dumps(self.point)}" if self.point else ""
        return f"{self.setting.name}/{self.method.name} {self.purpose} seed {self.seed}{point}"


@dataclass(frozen=True)
class Choice:
    """What tuning found for a setting and a method.

    Attributes:
        scores: mean validation accuracy of every grid point, None where it is not known yet or diverged.
        diverged: the places of points that could not be trained; they lose.
        done: whether all points are known.
        place: of the chosen point in the grid, the first of the best; None while some are not known, or all diverged.
    """

    scores: tuple[float | None, ...]
    diverged: frozenset[int]

    @property
    def done(self) -> bool:
        return all(score is not None or place in self.diverged for place, score in enumerate(self.scores))

    @property
    def place(self) -> int | None:
        known = [score for score in self.scores if score is not None]
        return self.scores.index(max(known)) if self.done and known else None

    @property
    def hopeless(self) -> bool:
        """Whether every point diverged, so that there is nothing to train a final run with."""
        return bool(self.scores) and len(self.diverged) == len(self.scores)


def job(experiment: Experiment, setting: Setting, method: Method, seed: int, purpose: str, point: Table) -> Job:
    """The run of a pair at a seed, trained with a grid point."""
    strategy, run = experiment.training(setting, method, point, seed)
    cheaper = experiment.tuning.arguments if experiment.tuning and purpose == TUNING else {}
    partition = setting.partition(cheaper)
    decides = {
        "schema": SCHEMA,
        "strategy": method.strategy,
        "settings": decisive(strategy, run),
        "partition": {"scheme": setting.scheme, "seed": seed, **partition.model_dump(mode="json")},
        "data": setting.data,
        **({} if setting.classes is None else {"classes": setting.classes}),
        "model": asdict(experiment.model),
    }
    return Job(setting, method, seed, purpose, point, strategy, run, partition, decides)


def tuning_jobs(experiment: Experiment, setting: Setting, method: Method) -> list[Job]:
    """One run for each point of the method's grid."""
    if experiment.tuning is None:
        return []
    return [job(experiment, setting, method, experiment.tuning.seed, TUNING, point) for point in method.grid]


def choose(experiment: Experiment, ledger: Ledger, setting: Setting, method: Method) -> Choice:
    """The grid point with the best mean validation accuracy; no test image has a say in it."""
    scores, diverged = [], set()
    for place, run in enumerate(tuning_jobs(experiment, setting, method)):
        line = ledger.find(run.fingerprint)
        scores.append(None if line is None else validation(line["results"]))
        if line is not None and DIVERGED in line["results"]:
            diverged.add(place)
    return Choice(tuple(scores), frozenset(diverged))


def final_jobs(experiment: Experiment, ledger: Ledger, setting: Setting, method: Method) -> list[Job]:
    """A run for each seed, with what tuning chose; none before it has chosen, or where every point diverged."""
    point: Table = {}
    if method.grid:
        chosen = choose(experiment, ledger, setting, method).place
        if chosen is None:
            return []
        point = method.grid[chosen]
    return [job(experiment, setting, method, seed, FINAL, point) for seed in setting.seeds]


def validation(results: Mapping[str, Any]) -> float | None:
    """Mean validation accuracy over the clients at the end of a run."""
    value: float | None = (results.get("val") or {}).get("mean")
    return value
