"""What an experiment is: the TOML file, read and checked before anything is trained."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hilora.experiments.checks import (
    SpecError,
    Table,
    check_names,
    inside,
    numbers,
    one_of,
    require,
    seeds,
    tables,
    text,
)
from hilora.federated.data import partitions
from hilora.federated.settings import RunConfig
from hilora.federated.strategies import STRATEGIES

DTYPES = ("auto", "float32", "bfloat16")
DOMAINS = "domains"  # the scheme whose images know their domain
_SETTINGS = {name: fields[0] for name, fields in partitions.settings().items()}
ARGUMENTS = {  # of a partition, with their defaults; `clients` has none, and that of `alpha` is the scheme's
    name: inspect.Parameter.empty if setting.is_required() else setting.default for name, setting in _SETTINGS.items()
} | {"alpha": None}
KINDS = {name: setting.annotation for name, setting in _SETTINGS.items()}
FIELDS = tuple(field.name for field in fields(RunConfig) if field.name != "seed")


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
    """The whole file. `run` holds fields of RunConfig for all runs; differences are taken from the row `compare`."""

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

    def config(self, setting: Setting, method: Method, point: Table, seed: int) -> RunConfig:
        """How a pair is trained: what stands nearer to the run overrides, [run] < setting < method < grid point; of
        `options`, each by itself."""
        given = (self.run, setting.run, method.run, point)
        values = {name: _frozen(value) for table in given for name, value in table.items()}
        options = {name: value for table in given for name, value in table.get("options", {}).items()}
        return RunConfig(**{**values, "options": options}, seed=seed)


def read_experiment(path: Path) -> Experiment:
    """Reads and checks a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        SpecError: it is not TOML, or a name, a field or a value in it is not known or does not fit.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no experiment {path}: give a TOML file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SpecError(f"{path} is not TOML: {error}") from error
    try:
        return _experiment(path, content)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _experiment(path: Path, content: Table) -> Experiment:
    known = ("title", "seeds", "compare", "model", "run", "settings", "tuning", "methods")
    check_names(content, known, "the file", required=("title", "seeds", "model", "settings", "methods"))
    for name in ("model", "run", "settings", "tuning", "methods"):
        require(isinstance(content.get(name, {}), dict), f"{name} is {content.get(name)!r}, expected a table [{name}]")
    shared = seeds(content["seeds"], "seeds")
    settings = {name: _setting(name, table, shared) for name, table in tables(content, "settings").items()}
    methods = {name: _method(name, table, settings) for name, table in tables(content, "methods").items()}
    compare = one_of(content.get("compare", next(iter(methods))), methods, "compare")
    experiment = Experiment(
        path,
        text(content["title"], "title"),
        _model(content["model"]),
        _run(content.get("run", {}), "run"),
        settings,
        methods,
        _tuning(content.get("tuning"), settings),
        compare,
    )
    _check_grids(experiment)
    for setting, method in experiment.pairs:
        _check_points(experiment, setting, method)
    return experiment


def _check_points(experiment: Experiment, setting: Setting, method: Method) -> None:
    """Every grid point gives a training, and none the same as another."""
    known: list[Table] = []
    for number, point in enumerate(method.grid or ({},), start=1):
        try:
            run = STRATEGIES[method.strategy].adapted(experiment.config(setting, method, point, 0)).to_dict()
        except (TypeError, ValueError, OverflowError) as error:
            raise SpecError(f"{method.name} in {setting.name} cannot be trained with {point}: {error}") from error
        del run["cohort_size"]  # decides nothing
        where = f"methods.{method.name}.grid, point {number}"
        require(run not in known, f"{where} is in {setting.name} the same run as one before it: give it other values")
        known.append(run)


def _run(table: Any, place: str) -> Table:
    """Fields of RunConfig; their values are checked together, as a training has them."""
    check_names(table, FIELDS, place)
    options = table.get("options", {})
    require(isinstance(options, dict), f"{place}.options is {options!r}, expected a table")
    for name, value in options.items():
        fits = type(value) in (int, float)
        require(fits, f"{place}.options.{name} is {value!r}, expected a number")
    found: Table = table
    return found


def _model(table: Table) -> Model:
    check_names(table, tuple(field.name for field in fields(Model)), "model", required=("backbone",))
    model = Model(**table)
    text(model.backbone, "model.backbone")
    if model.weights is not None:
        inside(model.weights, "model.weights")
    one_of(model.dtype, DTYPES, "model.dtype")
    size = model.img_size
    fits = size is None or (type(size) is int and size > 0)
    require(fits, f"model.img_size is {size!r}, expected a number of pixels")
    return model


def _setting(name: str, table: Table, shared: tuple[int, ...]) -> Setting:
    place = f"settings.{name}"
    own = ("data", "classes", "partition", "seeds", "run")
    needed = [argument for argument, default in ARGUMENTS.items() if default is inspect.Parameter.empty]
    check_names(table, (*own, *ARGUMENTS), place, required=("data", "partition", *needed))
    scheme, classes = one_of(table["partition"], partitions.PARTITIONS, f"{place}.partition"), table.get("classes")
    fits = classes is None or (type(classes) is int and classes > 1 and scheme == DOMAINS)
    require(fits, f"{place}.classes is {classes!r}, expected two or more, and only where the partition is {DOMAINS!r}")
    return Setting(
        name,
        inside(table["data"], f"{place}.data"),
        classes,
        scheme,
        numbers({key: value for key, value in table.items() if key not in own}, KINDS, place),
        seeds(table["seeds"], f"{place}.seeds") if "seeds" in table else shared,
        _run(table.get("run", {}), f"{place}.run"),
    )


def _method(name: str, table: Table, settings: Mapping[str, Setting]) -> Method:
    place = f"methods.{name}"
    known = ("strategy", "label", "run", "grid", "settings", "why", "reference", "paper")
    check_names(table, known, place)
    strategy = one_of(table.get("strategy", name), STRATEGIES, f"{place}.strategy")
    grid = table.get("grid", [])
    require(isinstance(grid, list), f"{place}.grid is {grid!r}, expected a list of tables")
    for number, point in enumerate(grid, start=1):
        _run(point, f"{place}.grid, point {number}")
    among = table.get("settings", list(settings))
    fits = isinstance(among, list) and among and all(isinstance(one, str) and one in settings for one in among)
    require(bool(fits), f"{place}.settings is {among!r}, expected some of {', '.join(settings)}")
    elsewhere = set(settings) - set(among)
    require(not elsewhere or "why" in table, f"{place} leaves out {', '.join(sorted(elsewhere))}: say why = '...'")
    reference = table.get("reference", False)
    require(isinstance(reference, bool), f"{place}.reference is {reference!r}, expected true or false")
    paper = table.get("paper", {})
    check_names(paper, tuple(settings), f"{place}.paper")
    for setting, figure in paper.items():
        fits = type(figure) in (int, float) and 0 <= figure <= 100
        require(fits, f"{place}.paper.{setting} is {figure!r}, expected an accuracy in %")
    label, why = (text(table.get(key, default), f"{place}.{key}") for key, default in (("label", name), ("why", "")))
    run = _run(table.get("run", {}), f"{place}.run")
    return Method(name, strategy, label, run, tuple(grid), tuple(among), why, reference, paper)


def _tuning(table: Table | None, settings: Mapping[str, Setting]) -> Tuning | None:
    if table is None:
        return None
    check_names(table, ("seed", *ARGUMENTS), "tuning", required=("seed",))
    seed = seeds([table["seed"]], "tuning.seed")[0]
    arguments = numbers({key: value for key, value in table.items() if key != "seed"}, KINDS, "tuning")
    clash = [name for name, setting in settings.items() if seed in setting.seeds]
    require(not clash, f"tuning.seed is {seed}, which final runs of {', '.join(clash)} have: choose another")
    return Tuning(seed, arguments)


def _check_grids(experiment: Experiment) -> None:
    """Equal effort for all methods: every grid has the same number of points."""
    sizes = {name: len(method.grid) for name, method in experiment.methods.items()}
    said = ", ".join(f"{name} {size}" for name, size in sizes.items())
    require(len(set(sizes.values())) == 1, f"grids differ in length ({said}): give all methods equally many points")
    has_grid, has_tuning = any(sizes.values()), experiment.tuning is not None
    require(has_tuning or not has_grid, "there are grids and no [tuning]: give it a seed")
    require(has_grid or not has_tuning, "there is [tuning] and no grid: give every method one, or leave it out")


def _frozen(value: Any) -> Any:
    """A list as the tuple that RunConfig keeps; it reads either."""
    return tuple(value) if isinstance(value, list) else value
