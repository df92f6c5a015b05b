"""What `summary.json` says of a run: the one schema of results, for runs, tables of experiments and benchmarks.

Accuracies are fractions of 1; a figure that was not measured is None.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # pydantic wants these before Python 3.12
)

from pydantic import FiniteFloat, Strict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from hilora.errors import FileError, InvalidValueError, MissingFileError
from hilora.files import PathLike, plain, read_json, write_json

SCHEMA = 2
"""1 had no key `schema`, no bytes of each client, and in its first files only some of the figures."""

Figure = Annotated[FiniteFloat, Strict()] | None
Count = Annotated[int, Strict()]
Text = Annotated[str, Strict()]


class Accuracy(TypedDict):
    """Over clients: the mean, the mean of the worst tenth, the standard deviation."""

    mean: Figure
    tail: Figure
    std: Figure


class Unseen(TypedDict):
    """Mean accuracy of clients that took no part: before they train anything, and after epochs of their own."""

    zero_leaf: Figure
    leaf: Figure


class Grouping(TypedDict):
    """How many groups there are, and their agreement with the true ones."""

    k: Count
    ari: Figure


class Clusters(Grouping):
    """The group of each seen client, and that of each unseen one."""

    labels: list[Count]
    unseen: NotRequired[list[Count]]


class EachWay(TypedDict):
    """Bytes that each seen client sent and received."""

    up: list[Figure]
    down: list[Figure]


class Communication(TypedDict):
    """Bytes a client and round."""

    up: Figure
    down: Figure
    per_client: NotRequired[EachWay]


class Phases(TypedDict):
    """Seconds of training; of evaluating, and of serving unseen clients; of forming groups; of writing checkpoints and
    metrics."""

    train: Figure
    evaluate: Figure
    group: Figure
    write: Figure


PHASES = tuple(Phases.__annotations__)


class Diagnosis(TypedDict, total=False):
    """The terms of the paper's Theorem 1 after a tier."""

    train_loss: Figure
    overlap: dict[Text, Figure]
    label_distance: Figure


class BudgetGroup(TypedDict):
    """Clients of one budget: its ranks of an adapter and its blocks, where these are limited; the seen clients by
    their ids, their test accuracy at the end, and the mean of the unseen ones; the ranks of each tier that they held
    last, on the mean, for a tier may have less room than a budget; how many numbers one trained at most; bytes a client
    and round; FLOPs of all training by image of the rounds."""

    ranks: Count | None
    layers: Count | None
    clients: list[Count]
    accuracy: Accuracy
    unseen: NotRequired[Unseen]
    held: NotRequired[dict[Text, Figure]]
    parameters: NotRequired[Count]
    up: Figure
    down: Figure
    flops: Figure


class Summary(TypedDict):
    """A run, or as much of one as its interruption left.

    Attributes:
        schema: of a file; absent in the first ones.
        tiers: after each tier, in the order in which these were trained; `final` is the last of them.
        val: on validation images, at the end.
        seconds: what the run took, but for its writing.
        images_per_second: of the training alone; where there is no `seconds_by_phase`, of all `seconds`.
        per_client: lists of `ids` and `unseen_ids`, and of accuracies in their order.
        per_client_by_tier: test accuracies after each tier, in the order of `ids`.
        budgets: where clients have some, of each share of them, in the order of the setting.
        trained_parameters: how many numbers a client trained at most, those with the largest budget where they differ.
        communication: absent, like all below, where it was not measured.
    """

    schema: NotRequired[Count]
    strategy: Text
    partition: Text
    seed: Count
    data: Text
    backbone: Text
    tiers: dict[Text, Accuracy]
    final: Accuracy
    unseen: Unseen
    clusters: Clusters | None
    seconds: Figure
    images_per_second: Figure
    seconds_by_phase: NotRequired[Phases]
    dtype: NotRequired[Text]
    val: NotRequired[Accuracy]
    per_client: NotRequired[dict[Text, list[Figure]]]
    per_client_by_tier: NotRequired[dict[Text, list[Figure]]]
    diagnostics: NotRequired[dict[Text, Diagnosis]]
    budgets: NotRequired[list[BudgetGroup]]
    communication: NotRequired[Communication]
    trained_parameters: NotRequired[Count]
    images: NotRequired[Count]
    rounds: NotRequired[Count]
    interrupted: NotRequired[bool]
    config: NotRequired[dict[str, Any]]
    arguments: NotRequired[dict[str, Any]]


class Results(TypedDict, total=False):
    """What is kept of a run where there are many, as in the ledger of an experiment.

    Attributes:
        diverged: why there are no figures.
    """

    tiers: dict[Text, Accuracy]
    final: Accuracy
    unseen: Unseen
    clusters: Grouping | None
    seconds: Figure
    val: Accuracy
    per_client: dict[Text, list[Figure]]
    diagnostics: dict[Text, Diagnosis]
    communication: Communication
    budgets: list[BudgetGroup]
    trained_parameters: Count
    images: Count
    rounds: Count
    diverged: Text


def write_summary(path: PathLike, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, the version of the schema first.

    Raises:
        InvalidValueError: what is given is no summary; nothing is written then.
    """
    whole = plain({"schema": SCHEMA, **summary})
    wrong = mistake(Summary, whole)
    if wrong:
        raise InvalidValueError(f"{os.fspath(path)} is not written, since this is no summary of a run: {wrong}")
    write_json(path, whole)


def read_summary(path: PathLike) -> dict[str, Any]:
    """What `write_summary` wrote, now or in earlier versions.

    Raises:
        MissingFileError: there is no such file.
        FileError: it holds something else, or was written by a later version.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"there is no summary {path}: give the summary.json in the folder of a run")
    found = read_json(path)
    version = found.get("schema", 1) if isinstance(found, dict) else 1
    if isinstance(version, int) and version > SCHEMA:
        raise FileError(f"{path} has schema {version}, expected at most {SCHEMA}: update hilora, which wrote it")
    wrong = mistake(Summary, found)
    if wrong:
        raise FileError(f"{path} is no summary of a run: {wrong}")
    summary: dict[str, Any] = found
    return summary


def mistake(kind: Any, value: Any) -> str | None:
    """Where a value first departs from a type of the schema, and how; None where it does not."""
    try:
        _adapter(kind).validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "all of it"
        return f"{place} is {_short(first['input'])}: {first['msg']}"
    return None


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"
