"""Versions of what the ledger says of a run: how older ones are read, and the defaults that each had.

The versions are in `defaults.json`. Whoever changes a default of a setting adds a version with the defaults as they are
then; the older stay as they are, for lines that were written under them. A new setting whose default is what was done
before it joins the newest version: older lines then say the same as they did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

DEFAULTS: Mapping[int, Mapping[str, Any]] = {
    int(version): defaults
    for version, defaults in json.loads(Path(__file__).with_name("defaults.json").read_text(encoding="utf-8")).items()
}
"""By version; in one, `strategies` and `partitions` by name, and `model`."""

SCHEMA = max(DEFAULTS)
"""Of the lines that are written now."""


def completed(decides: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run, in the newest schema, with nothing left unsaid."""
    found = upgrade(decides)
    versions = [DEFAULTS[version] for version in sorted(DEFAULTS) if version >= found["schema"]]
    strategy, scheme = found["strategy"], found["partition"].get("scheme")
    for defaults in versions:  # the first that knows a setting says where it stands
        found["settings"] = {**defaults["strategies"].get(strategy, {}), **found["settings"]}
        found["partition"] = {**defaults["partitions"].get(scheme, {}), **found["partition"]}
        found["model"] = {**defaults["model"], **found["model"]}
    return {**found, "schema": SCHEMA}


def upgrade(decides: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run in the second schema or a later one, of a line of any.

    The first kept the settings of all methods in `run`, and numbers that one method has in `run.options`; and all
    partitions had all arguments. Here are those alone that the method and the partition have.
    """
    if "schema" in decides:
        return dict(decides)
    before, after = DEFAULTS[1], DEFAULTS[2]
    strategy, run = decides["strategy"], {**before["run"], **decides["run"]}
    options = {**before["options"].get(strategy, {}), **run.pop("options")}
    renamed = before["renamed"].get(strategy, {})
    values = {**run, **{renamed.get(name, name): value for name, value in options.items()}}
    del values["cohort_size"]
    scheme = decides["partition"].get("scheme")
    arguments = {**before["partition"], **decides["partition"]}
    return {
        **{name: value for name, value in decides.items() if name != "run"},
        "schema": 2,
        "settings": _known(values, after["strategies"].get(strategy)),
        "partition": _known(arguments, after["partitions"].get(scheme), "scheme", "seed", "clients"),
        "model": {**before["model"], **decides["model"]},
    }


def _known(values: Mapping[str, Any], defaults: Mapping[str, Any] | None, *also: str) -> dict[str, Any]:
    """Of the values those that have a default, or are in `also`, in the form of the default; all where it is unknown
    which there are."""
    if defaults is None:
        return dict(values)
    found = {name: values[name] for name in also if name in values}
    for name, default in defaults.items():
        value = values.get(name, default)
        if isinstance(default, Mapping) and isinstance(value, Mapping):
            value = {key: value[key] for key in default if key in value}  # the tiers that the method has
        elif isinstance(default, bool):
            value = bool(value)
        found[name] = default if value is None else value
    return found


def upgraded_line(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the ledger in a newer schema; of an arithmetic that was to be chosen, the one that was."""
    decides = upgrade(line["decides"])
    if decides["model"].get("dtype") == "auto":
        decides["model"] = {**decides["model"], "dtype": line["dtype"]}
    key = dict(line["key"])
    overrides = dict(key.get("overrides", {}))
    renamed = DEFAULTS[1]["renamed"].get(decides["strategy"], {})
    options = overrides.pop("options", {})
    key["overrides"] = {**overrides, **{renamed.get(name, name): value for name, value in options.items()}}
    kept = {name: value for name, value in line.items() if name not in ("key", "decides", "fingerprint")}
    return {"key": key, "decides": decides, **kept}
