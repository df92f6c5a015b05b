"""What a line of the ledger must hold for a report to read it."""

from __future__ import annotations

from typing import Any, NotRequired

from typing_extensions import TypedDict  # as in hilora.reporting.summary

from hilora.experiments.schema import DEFAULTS
from hilora.reporting.summary import Results, Text, mistake

Line = dict[str, Any]
DIVERGED = "diverged"  # in the results of a run that could not be trained: why


class Run(TypedDict):
    """Settings of the training, and those of its strategy alone among them."""

    options: NotRequired[dict[str, Any]]


class Decides(TypedDict):
    """All that decides a result."""

    schema: NotRequired[int]
    strategy: Text
    run: NotRequired[Run]  # of the first schema, in place of the settings
    settings: NotRequired[dict[str, Any]]
    partition: dict[str, Any]
    model: dict[str, Any]


class Record(TypedDict):
    """A finished run: which it is, what came out, and under which conditions."""

    key: dict[str, Any]
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
    if decides.get("schema", 1) not in DEFAULTS or ("settings" if "schema" in decides else "run") not in decides:
        return False
    clients = value["results"].get("per_client", {})
    return len(clients.get("ids", ())) == len(clients.get("test", ()))
