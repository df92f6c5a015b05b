"""What the ledger has for each setting and method: the cells of a report's tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hilora.experiments.experiment import Experiment, Method, Setting
from hilora.experiments.ledger import Ledger
from hilora.experiments.plan import Choice, choose, final_jobs, tuning_jobs
from hilora.experiments.records import DIVERGED, Line
from hilora.reporting.statistics import Interval, Spread, differences, interval, spread


@dataclass(frozen=True)
class Cell:
    """The runs of a method in a setting.

    Attributes:
        choice: what tuning found; None where there are no grids.
        finals: the ledger's lines of the final runs that are done, by seed, those that diverged included.
        tuned: those of the tuning runs that are done.
    """

    setting: Setting
    method: Method
    choice: Choice | None
    finals: Mapping[int, Line]
    tuned: Sequence[Line]

    @property
    def applies(self) -> bool:
        """Whether the method is run in the setting at all."""
        return self.setting.name in self.method.settings

    @property
    def hopeless(self) -> bool:
        """Whether every grid point diverged, so that there are no final runs."""
        return self.choice is not None and self.choice.hopeless

    @property
    def wanted(self) -> int:
        """How many final runs there are to be."""
        return len(self.setting.seeds) if self.applies and not self.hopeless else 0

    @property
    def complete(self) -> bool:
        return len(self.finals) == self.wanted

    @property
    def diverged(self) -> list[int]:
        """The seeds of final runs that diverged."""
        return [seed for seed, line in self.finals.items() if DIVERGED in line["results"]]

    @property
    def trained(self) -> Mapping[int, Line]:
        """The lines that figures are taken from: none where a seed diverged, for the others say too much good."""
        return {} if self.diverged else self.finals

    def by_seed(self, *keys: str) -> dict[int, Any]:
        """`results[key][key]…` of the seeds that have such a figure."""
        found = {seed: _at(line["results"], keys) for seed, line in self.trained.items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def over_seeds(self, *keys: str) -> Spread | None:
        """Mean and spread over seeds of `results[key][key]…`."""
        return spread(list(self.by_seed(*keys).values()))

    def clients(self) -> dict[int, dict[int, float]]:
        """Test accuracy of each seen client at the end, by seed and id; empty where it was not recorded."""
        found = {}
        for seed, line in self.trained.items():
            per_client = line["results"].get("per_client") or {}
            pairs = zip(per_client.get("ids", ()), per_client.get("test", ()), strict=True)
            found[seed] = {client: value for client, value in pairs if value is not None}
        return {seed: clients for seed, clients in found.items() if clients}

    def accuracy(self) -> Interval | None:
        """Mean personalised accuracy with its interval over clients, or without one where clients are not recorded."""
        clients = self.clients()
        if clients and set(clients) == set(self.trained):
            return interval([list(values.values()) for values in clients.values()])
        known = self.over_seeds("final", "mean")
        return None if known is None else Interval(known.mean, None, None)

    def less(self, other: Cell) -> tuple[dict[int, list[float]], Interval | None]:
        """The differences of clients to those of another method in the same setting, by seed, and their interval."""
        found = differences(self.clients(), other.clients())
        return found, interval(list(found.values()))


def collect(experiment: Experiment, ledger: Ledger) -> list[list[Cell]]:
    """The cells of all settings, reference rows last, in the order of the file."""
    methods = sorted(experiment.methods.values(), key=lambda method: method.reference)
    return [
        [_cell(experiment, ledger, setting, method) for method in methods] for setting in experiment.settings.values()
    ]


def _cell(experiment: Experiment, ledger: Ledger, setting: Setting, method: Method) -> Cell:
    if setting.name not in method.settings:
        return Cell(setting, method, None, {}, ())
    found = [(job, ledger.find(job.fingerprint)) for job in final_jobs(experiment, ledger, setting, method)]
    tuned = [ledger.find(job.fingerprint) for job in tuning_jobs(experiment, setting, method)]
    return Cell(
        setting,
        method,
        choose(experiment, ledger, setting, method) if method.grid else None,
        {job.seed: line for job, line in found if line is not None},
        [line for line in tuned if line is not None],
    )


def _at(results: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        results = results.get(key) if results else None
    return results
