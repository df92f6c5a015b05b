"""What is in a file or folder, and what can be done with it. Nothing that is read is run, and no tensor is loaded."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hilora.adapters.io.files import FORMAT, parsed
from hilora.errors import FileError, MissingFileError
from hilora.files import read_json, read_lines
from hilora.reporting.comparison import comparison_text
from hilora.reporting.summary import read_summary
from hilora.reporting.tables import MISSING, Row, Table

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Contents:
    """Of a file or folder.

    Attributes:
        kind: what it is.
        facts: about all of it, by name.
        rows: a table of its parts, a dict of the same keys for each.
        advice: what can be done with it, a command or line of Python each.
        shown: a text in the place of the facts and the table, where one says more.
    """

    kind: str
    facts: Mapping[str, Any]
    rows: tuple[Mapping[str, Any], ...] = ()
    advice: tuple[str, ...] = ()
    shown: str = ""

    def text(self) -> str:
        """For a terminal."""
        parts = [self.kind]
        if self.shown:
            parts.append(self.shown)
        elif self.facts:
            parts.append("\n".join(f"  {name}: {_cell(value)}" for name, value in self.facts.items()))
        if self.rows and not self.shown:
            cells = tuple(Row(tuple(map(_cell, row.values()))) for row in self.rows)
            parts.append(Table(tuple(self.rows[0]), cells).text())
        if self.advice:
            parts.append("\n".join(["What to do with it:", *(f"  {line}" for line in self.advice)]))
        return "\n\n".join(parts)

    def plain(self) -> dict[str, Any]:
        """For a program."""
        return {"kind": self.kind, **self.facts, "parts": list(self.rows), "advice": list(self.advice)}


def contents(path: Path) -> Contents:
    """What a file or folder holds.

    Raises:
        MissingFileError: there is nothing at the path.
        FileError: it is of no kind that is known, or damaged.
    """
    if not path.exists():
        raise MissingFileError(f"there is nothing at {path}")
    if path.is_dir():
        inside = next((path / name for name in READERS if "." in name[1:] and (path / name).is_file()), None)
        if inside is None:
            raise FileError(f"{path} is no folder of a run, of a comparison or of PEFT: give one of its files")
        return contents(inside)
    read = next((read for name, read in READERS.items() if path.name.endswith(name)), None)
    if read is None or not path.is_file():
        raise FileError(f"{path} is of no kind that is known: expected the end of its name to be {', '.join(READERS)}")
    return read(path)


def _run(path: Path) -> Contents:
    summary, folder = read_summary(path), path.parent
    names = ("strategy", "data", "backbone", "partition", "seed", "rounds", "interrupted", "dtype", "seconds")
    tiers = [{"after": tier, **accuracy} for tier, accuracy in summary["tiers"].items()]
    unseen = [{"after": f"unseen, {name}", "mean": value} for name, value in summary["unseen"].items()]
    rows = [{name: row.get(name) for name in ("after", "mean", "tail", "std")} for row in tiers + unseen]
    return Contents(
        "a run, interrupted" if summary.get("interrupted") else "a run",
        {name: summary[name] for name in names if name in summary},
        tuple(rows),
        (
            f"hilora compare {folder} OTHER_RUN …",
            f"hilora merge {folder} --client 0 --out client-0.safetensors",
            f"hilora inspect {folder / 'adapters.safetensors'}",
        ),
        comparison_text([summary]),
    )


def _comparison(path: Path) -> Contents:
    summaries = read_json(path)
    if not isinstance(summaries, list) or not all(isinstance(one, dict) and "strategy" in one for one in summaries):
        raise FileError(f"{path} is no comparison of runs: expected a list of their summaries")
    rows = tuple({"run": one["strategy"], "mean": (one.get("final") or {}).get("mean")} for one in summaries)
    folders = " ".join(str(path.parent / row["run"]) for row in rows)
    return Contents(
        f"a comparison of {len(rows)} runs", {}, rows, (f"hilora compare {folders}",), comparison_text(summaries)
    )


def _metrics(path: Path) -> Contents:
    records = [line.record for line in read_lines(path)]
    rounds = [record for record in records if record is not None and "round" in record]
    rows = [{"round": one["round"], "stage": one.get("stage"), "loss": one.get("loss"), **_test(one)} for one in rounds]
    missing = sorted(set(range(1, max((row["round"] for row in rows), default=0) + 1)) - {row["round"] for row in rows})
    facts = {"rounds": len(rows), "lines that are no records": records.count(None), "rounds that are missing": missing}
    return Contents("the rounds of a run", facts, tuple(rows), (f"hilora inspect {path.parent}",))


def _test(record: Mapping[str, Any]) -> dict[str, Any]:
    test = record.get("test") or {}
    return {"accuracy": test.get("mean"), "tail": test.get("tail"), "seconds": record.get("seconds")}


def _ledger(path: Path) -> Contents:
    from hilora.experiments.ledger import Ledger

    ledger = Ledger(path)
    runs = Counter((line["decides"]["partition"].get("scheme"), line["decides"]["strategy"]) for line in ledger.lines)
    rows = tuple({"partition": scheme, "method": method, "runs": count} for (scheme, method), count in runs.items())
    facts = {"runs": len(ledger), "lines": len(ledger.lines), "lines that are no records": ledger.torn}
    return Contents(
        "the ledger of an experiment",
        facts,
        rows,
        (f"hilora experiment report {str(path).removesuffix('.ledger.jsonl')}.toml",),
    )


def _experiment(path: Path) -> Contents:
    from hilora.experiments.spec import read_experiment

    experiment = read_experiment(path)
    rows = tuple(
        {"setting": setting.name, "method": method.name, "grid points": len(method.grid), "seeds": list(setting.seeds)}
        for setting, method in experiment.pairs
    )
    commands = (f"hilora experiment run {path} --data-dir DIR", f"hilora experiment report {path}")
    facts = {"title": experiment.title, "backbone": experiment.model.backbone, "compares with": experiment.compare}
    return Contents("an experiment", facts, rows, commands)


def _peft(path: Path) -> Contents:
    described = read_json(path)
    names = ("base_model_name_or_path", "peft_type", "r", "lora_alpha", "target_modules", "modules_to_save")
    return Contents(
        "an adapter of PEFT",
        {name: described[name] for name in names if name in described},
        (),
        (f"hilora.import_peft(model, {str(path.parent)!r})",),
    )


def _tensors(path: Path) -> Contents:
    shapes, metadata = _header(path)
    described = metadata.get("hilora")
    if described is None:
        return _weights(path, shapes)
    content = parsed(described, path)
    if metadata.get("format") != FORMAT:
        return _checkpoint(path, content)
    if "classes" in content:
        rows = tuple({"tensor": name, "shape": list(shape)} for name, shape in shapes.items())
        facts = {"classes": len(content["classes"])}
        return Contents("the heads of a run's clients", facts, rows, (f"hilora inspect {path.parent}",))
    try:
        return _adapters(path, content, shapes)
    except (KeyError, TypeError, AttributeError) as error:
        raise FileError(f"{path} does not describe adapters: {error!r}") from error


def _adapters(path: Path, content: Mapping[str, Any], shapes: Shapes) -> Contents:
    config = content["config"]
    projections = [name for bank in content["projections"] for name in bank]
    rows = []
    for tier in config["tiers"]:
        own = {name: shape for name, shape in shapes.items() if name.split(".")[1:2] == [tier]}
        slots = next(iter(own.values()))[1]
        ranks = {"r": config["r"][tier], "lora_alpha": config["lora_alpha"][tier]}
        rows.append({"tier": tier, **ranks, "slots": slots, "parameters": sum(map(math.prod, own.values()))})
    head = {name: list(shape) for name, shape in shapes.items() if name.startswith("head.")}
    facts = {
        "of": content.get("base", {}).get("name"),
        "projections": f"{projections[0]} … {projections[-1]}, {len(projections)} in all",
        "head": head or None,
    }
    chosen = "".join(f", {row['tier']}=0" for row in rows if row["slots"] > 1)
    then = f"hilora.merge(model{chosen})  # or set_slots, which leaves the adapters as they are"
    return Contents("adapters", facts, tuple(rows), (f"hilora.load_adapters(model, {str(path)!r})", then))


def _checkpoint(path: Path, content: Mapping[str, Any]) -> Contents:
    try:
        tree = json.loads(content["tree"])
        identity = tree["identity"]
        facts = {name: tree.get(name) for name in ("round", "seconds_by_phase", "finished")}
        facts |= {"strategy": identity["strategy"], "dtype": identity["dtype"], "partition": identity["partition"]}
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{path} does not describe a checkpoint: {error!r}") from error
    return Contents("the checkpoint of a run", facts, (), ("the command of the run, once more, with --resume",))


def _weights(path: Path, shapes: Shapes) -> Contents:
    if any(".lora_A" in name for name in shapes):
        advice = (f"hilora.import_peft(model, {str(path.parent)!r})",)
        return Contents("adapters of another library", {"tensors": len(shapes)}, (), advice)
    facts = {"tensors": len(shapes), "parameters": sum(map(math.prod, shapes.values()))}
    return Contents("weights of a model", facts, (), (f"hilora train --backbone NAME --weights {path}",))


def _header(path: Path) -> tuple[Shapes, dict[str, str]]:
    """The shapes of a file's tensors, and its metadata."""
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return shapes, file.metadata() or {}
    except SafetensorError as error:
        raise FileError(f"{path} cannot be read: {error}") from error


def _cell(value: Any) -> str:
    if value is None or value == []:
        return MISSING
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


READERS: dict[str, Callable[[Path], Contents]] = {
    "summary.json": _run,
    "comparison.json": _comparison,
    "adapter_config.json": _peft,
    "metrics.jsonl": _metrics,
    ".ledger.jsonl": _ledger,
    ".toml": _experiment,
    ".safetensors": _tensors,
}
"""What reads a file, by the end of its name; of a folder, the first of these names in it counts."""
