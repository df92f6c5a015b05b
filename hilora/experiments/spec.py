"""An experiment from its TOML file, read and checked before anything is trained."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from hilora.errors import InvalidValueError, MissingFileError
from hilora.experiments.checks import (
    SpecError,
    Table,
    check_names,
    check_size,
    inside,
    numbers,
    one_of,
    require,
    seeds,
    tables,
    text,
)
from hilora.experiments.experiment import AUTO, DOMAINS, SHARED, Experiment, Method, Model, Setting, Tuning
from hilora.experiments.identity import decisive
from hilora.federated.data.partitions import PARTITIONS
from hilora.federated.strategies import STRATEGIES, own_fields

DTYPES = (AUTO, "float32", "bfloat16")
MARK = "\ufeff"  # of the byte order, which some editors begin a file with


def read_experiment(path: Path) -> Experiment:
    """Reads and checks a TOML file.

    Raises:
        FileNotFoundError: there is no such file.
        SpecError: it is not TOML, or a name, a field or a value in it is not known or does not fit.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no experiment {path}: give a TOML file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8").removeprefix(MARK))
    except (ValueError, RecursionError) as error:
        raise SpecError(f"{path} is not TOML: {error}") from error
    try:
        check_size(content)
        return _experiment(path, content)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from error


def _experiment(path: Path, content: Table) -> Experiment:
    known = ("title", "seeds", "compare", "model", "run", "settings", "tuning", "methods")
    check_names(content, known, "the file", required=("title", "seeds", "model", "settings", "methods"))
    for name in ("model", "run", "settings", "tuning", "methods"):
        require(isinstance(content.get(name, {}), dict), f"{name} is {content.get(name)!r}, expected a table [{name}]")
    shared = seeds(content["seeds"], "seeds")
    strategies = {
        name: _strategy(name, table).get("strategy", name) for name, table in tables(content, "methods").items()
    }
    of_any = tuple(dict.fromkeys((*SHARED, *(field for one in strategies.values() for field in _own(one)))))
    settings = {name: _setting(name, table, shared, of_any) for name, table in tables(content, "settings").items()}
    methods = {
        name: _method(name, table, strategies[name], settings) for name, table in tables(content, "methods").items()
    }
    compare = one_of(content.get("compare", next(iter(methods))), methods, "compare")
    experiment = Experiment(
        path,
        text(content["title"], "title"),
        _model(content["model"]),
        _run(content.get("run", {}), "run", of_any),
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
            strategy, training = experiment.training(setting, method, point, 0)
            strategy.check(training)
            run = decisive(strategy, training)
        except InvalidValueError as error:
            raise SpecError(f"{method.name} in {setting.name} cannot be trained with {point}: {error}") from error
        where = f"methods.{method.name}.grid, point {number}"
        require(run not in known, f"{where} is in {setting.name} the same run as one before it: give it other values")
        known.append(run)


def _own(strategy: str) -> tuple[str, ...]:
    return tuple(own_fields(STRATEGIES[strategy]))


def _strategy(name: str, table: Table) -> Table:
    """A method's table, which names a strategy that there is."""
    one_of(table.get("strategy", name), STRATEGIES, f"methods.{name}.strategy")
    return table


def _run(table: Any, place: str, known: tuple[str, ...]) -> Table:
    """Settings of trainings; their values are checked together, as a training has them."""
    hint = "a method's own settings stand beside the others, without a table of options"
    require(not (isinstance(table, dict) and "options" in table), f"{place} has unknown 'options': {hint}")
    check_names(table, known, place)
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


def _setting(name: str, table: Table, shared: tuple[int, ...], known: tuple[str, ...]) -> Setting:
    place = f"settings.{name}"
    own = ("data", "classes", "partition", "seeds", "run")
    require("partition" in table, f"{place} lacks partition")
    scheme, classes = one_of(table["partition"], PARTITIONS, f"{place}.partition"), table.get("classes")
    arguments = PARTITIONS[scheme].model_fields
    needed = [argument for argument, field in arguments.items() if field.is_required()]
    check_names(table, (*own, *arguments), place, required=("data", *needed))
    fits = classes is None or (type(classes) is int and classes > 1 and scheme == DOMAINS)
    require(fits, f"{place}.classes is {classes!r}, expected two or more, and only where the partition is {DOMAINS!r}")
    setting = Setting(
        name,
        inside(table["data"], f"{place}.data"),
        classes,
        scheme,
        numbers({key: value for key, value in table.items() if key not in own}, arguments, place),
        seeds(table["seeds"], f"{place}.seeds") if "seeds" in table else shared,
        _run(table.get("run", {}), f"{place}.run", known),
    )
    _check_partition(setting, place)
    return setting


def _check_partition(setting: Setting, place: str, other: Table | None = None) -> None:
    try:
        setting.partition(other)
    except InvalidValueError as error:
        raise SpecError(f"{place}: {error}") from error


def _method(name: str, table: Table, strategy: str, settings: Mapping[str, Setting]) -> Method:
    place, known = f"methods.{name}", (*SHARED, *_own(strategy))
    check_names(table, ("strategy", "label", "run", "grid", "settings", "why", "reference", "paper"), place)
    grid = table.get("grid", [])
    require(isinstance(grid, list), f"{place}.grid is {grid!r}, expected a list of tables")
    for number, point in enumerate(grid, start=1):
        _run(point, f"{place}.grid, point {number}", known)
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
    run = _run(table.get("run", {}), f"{place}.run", known)
    return Method(name, strategy, label, run, tuple(grid), tuple(among), why, reference, paper)


def _tuning(table: Table | None, settings: Mapping[str, Setting]) -> Tuning | None:
    if table is None:
        return None
    known = {name: field for one in settings.values() for name, field in PARTITIONS[one.scheme].model_fields.items()}
    check_names(table, ("seed", *known), "tuning", required=("seed",))
    seed = seeds([table["seed"]], "tuning.seed")[0]
    arguments = numbers({key: value for key, value in table.items() if key != "seed"}, known, "tuning")
    for setting in settings.values():
        _check_partition(setting, f"tuning in {setting.name}", arguments)
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
