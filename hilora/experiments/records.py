"""What a line of the ledger must hold for a report to read it."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # as in hilora.reporting.summary

from hilora.experiments.schema import SCHEMA
from hilora.reporting.summary import Count, Results, Text, mistake

Line = dict[str, Any]
DIVERGED = "diverged"  # in the results of a run that could not be trained: why


class Run(TypedDict):
    """Settings of the training; in the first schema those of its strategy alone in a table of their own."""

    options: NotRequired[dict[str, Any]]


class Scheme(TypedDict):
    """How the images are divided; its arguments beside it."""

    scheme: NotRequired[Text]


class Decides(TypedDict):
    """All that decides a result."""

    schema: NotRequired[Count]  # absent in the first
    strategy: Text
    run: NotRequired[Run]  # of the first schema, in place of the settings
    settings: NotRequired[dict[str, Any]]
    partition: Scheme
    model: dict[str, Any]


class Key(TypedDict):
    """What a run is called, and the grid point that it was trained with."""

    overrides: NotRequired[Run]


class Record(TypedDict):
    """A finished run: which it is, what came out, and under which conditions."""

    key: Key
    decides: Decides
    results: Results
    date: Text
    revision: Text
    torch: Text
    device: Text
    dtype: Text


def is_record(value: Any) -> bool:
    """Whether a value that JSON gave has the shape of a line. Figures may be absent; what is there is of its type."""
    if mistake(Record, value):
        return False
    decides = value["decides"]
    named = decides.get("schema", SCHEMA)  # the first has none
    if not 1 < named <= SCHEMA or ("settings" if "schema" in decides else "run") not in decides:
        return False
    clients = value["results"].get("per_client", {})
    return len(clients.get("ids", ())) == len(clients.get("test", ()))
