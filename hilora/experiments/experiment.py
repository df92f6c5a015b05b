"""What an experiment is: its settings, methods and grids, and how each pair of them is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hilora.experiments.checks import Table
from hilora.federated.data.partitions import PARTITIONS, Partition
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies import STRATEGIES, Strategy, own_fields

AUTO = "auto"
DOMAINS = "domains"  # the scheme whose images know their domain
SHARED = tuple(name for name in TrainingSettings.model_fields if name != "seed")


@dataclass(frozen=True)
class Model:
    """The frozen backbone of all runs, as `load_backbone` takes it; `weights` is a path inside the data folder."""

    backbone: str
    weights: str | None = None
    img_size: int | None = None
    dtype: str = "auto"


@dataclass(frozen=True)
class Setting:
    """A table of the report: who has which images, and the seeds of its final runs.

    `classes`: of images in domains, so many of the largest classes; None takes all.
    """

    name: str
    data: str
    classes: int | None
    scheme: str
    arguments: Table
    seeds: tuple[int, ...]
    run: Table

    def partition(self, other: Table | None = None) -> Partition:
        """The partition, with other settings in the place of its own where it has such.

        Raises:
            PartitionError: they do not fit.
        """
        kind = PARTITIONS[self.scheme]
        applies = {name: value for name, value in (other or {}).items() if name in kind.model_fields}
        return kind(**{**self.arguments, **applies})


@dataclass(frozen=True)
class Method:
    """A row of the report: a strategy, how it is trained, and the grid that its settings are chosen from."""

    name: str
    strategy: str
    label: str
    run: Table
    grid: tuple[Table, ...]
    settings: tuple[str, ...]
    why: str
    reference: bool
    paper: Mapping[str, float]


@dataclass(frozen=True)
class Tuning:
    """How grids are searched: with a seed that no final run has, and other arguments of the partition."""

    seed: int
    arguments: Table


@dataclass(frozen=True)
class Experiment:
    """The whole file. `run` holds settings of all runs; differences are taken from the row `compare`."""

    path: Path
    title: str
    model: Model
    run: Table
    settings: Mapping[str, Setting]
    methods: Mapping[str, Method]
    tuning: Tuning | None
    compare: str

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def pairs(self) -> list[tuple[Setting, Method]]:
        """What is run: each setting with the methods that apply to it, in the order of the file."""
        return [
            (setting, method)
            for setting in self.settings.values()
            for method in self.methods.values()
            if setting.name in method.settings
        ]

    def training(self, setting: Setting, method: Method, point: Table, seed: int) -> tuple[Strategy, TrainingSettings]:
        """How a pair is trained: what stands nearer to the run overrides, [run] < setting < method < grid point. A
        setting that other methods alone have, in [run] or the setting, is passed over.

        Raises:
            InvalidValueError: values do not fit.
        """
        given = (self.run, setting.run, method.run, point)
        values = {name: value for table in given for name, value in table.items()}
        kind = STRATEGIES[method.strategy]
        own = {name: value for name, value in values.items() if name in own_fields(kind)}
        shared = {name: value for name, value in values.items() if name in SHARED}
        return kind(**own), TrainingSettings(**shared, seed=seed)
