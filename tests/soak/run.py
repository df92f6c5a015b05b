"""Kill runs at random moments and let them go on: `python -m tests.soak.run --kills 1000 --seed 0` (`make soak`).

A run, and a table of runs, are begun in a process that is killed by SIGKILL after a random time, and again with the
same command until so many kills are through; then they are let go to their end. All that they leave must be, to the
bit, what they leave when nothing happens, but for times; and nothing else may lie there. Processes are forked from one
that has loaded the library.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hilora.cli.main import main as hilora
from hilora.federated.callbacks.checkpoint import has_checkpoint
from hilora.federated.data import glyphs

TIMES = ("seconds", "seconds_by_phase", "images_per_second", "date")
SMALL = [
    "--clients=5",
    "--images-per-client=8",
    "--rounds=2,2,2",
    "--rank=2",
    "--dtype=float32",
    "--device=cpu",
    "--quiet",
]
EXPERIMENT = """
title = "soak"
seeds = [0]
[model]
backbone = "glyph_vit"
dtype = "float32"
[run]
rounds = [1, 1, 1]
rank = 2
[settings.sc-dir]
data = "glyphs"
partition = "sc-dir"
clients = 5
images_per_client = 8
[methods.hilora]
[methods.fedit]
"""


def run(folder: Path) -> int:
    """A run, or what is left of it."""
    goes_on = ["--resume"] if has_checkpoint(folder / "out") else []
    return hilora(["train", *SMALL, "--strategy", "hilora", "--out", str(folder / "out"), *goes_on])


def experiment(folder: Path) -> int:
    """A table of runs, or what is left of it."""
    folder.mkdir(exist_ok=True)
    (folder / "soak.toml").write_text(EXPERIMENT)
    return hilora(["experiment", "run", str(folder / "soak.toml"), "--work", str(folder / "work")])


COMMANDS: dict[str, Callable[[Path], int]] = {"run": run, "experiment": experiment}


def left(folder: Path) -> dict[str, Any]:
    """All files below a folder: their bytes, or of JSON what it says but for times."""
    return {str(path.relative_to(folder)): _content(path, folder) for path in folder.rglob("*") if path.is_file()}


def _content(path: Path, folder: Path) -> Any:
    if path.suffix in (".json", ".jsonl"):
        lines = [path.read_text()] if path.suffix == ".json" else path.read_text().splitlines()
        return [_untimed(json.loads(line), str(folder)) for line in lines]
    if path.name.startswith("checkpoint") or path.suffix in (".html", ".txt"):  # has times inside
        return "there"
    return path.read_bytes()


def _untimed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(inner, folder) for key, inner in value.items() if key not in (*TIMES, "resume")}
    if isinstance(value, list):
        return [_untimed(inner, folder) for inner in value]
    return value.replace(folder, "") if isinstance(value, str) else value


def _child(name: str, folder: Path, log: Path) -> None:
    os.setsid()
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(COMMANDS[name](folder))


def attempt(name: str, folder: Path, seconds: float | None) -> int | None:
    """Runs a command, in a process of its own; its exit code, or None where it was killed after so many seconds."""
    child = multiprocessing.get_context("fork").Process(target=_child, args=(name, folder, folder.with_suffix(".log")))
    child.start()
    child.join(seconds)
    if child.exitcode is None and child.pid is not None:
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        return None
    return child.exitcode


@mock.patch.object(glyphs, "load_glyphs", functools.cache(glyphs.load_glyphs))  # drawn once for all that are forked
def soak(name: str, kills: int, seed: int, scratch: Path) -> list[str]:
    """What differs between a command that is left alone and one that is killed so often; nothing, where all is well."""
    torch.set_num_threads(1)  # a process that is forked has none of its parent's threads
    COMMANDS[name](scratch / "warm")  # loads what a run loads
    whole, draws = scratch / "whole", random.Random(f"{name} {seed}")
    started = time.perf_counter()
    if attempt(name, whole, None) != 0:
        return [f"{name}: fails by itself: {whole.with_suffix('.log').read_text()}"]
    length, expected, wrong = time.perf_counter() - started, left(whole), list[str]()
    number, done = 0, 0
    while done < kills and not wrong:
        folder = scratch / f"{name}-{number}"
        number += 1
        code: int | None = None
        for _ in range(min(draws.randint(1, 6), kills - done)):
            code = attempt(name, folder, length * draws.random())
            if code is not None:
                break
            done += 1
        if code is None:
            code = attempt(name, folder, None)
        if code != 0:
            wrong.append(f"{name} {number}: exit code {code}: {folder.with_suffix('.log').read_text()}")
            break
        found = left(folder)
        names = sorted(path for path in {*expected, *found} if expected.get(path) != found.get(path))
        wrong += [f"{name} {number}: {path} is {_said(found, path)}, was {_said(expected, path)}" for path in names]
    return wrong


def _said(files: dict[str, Any], path: str) -> str:
    return repr(files[path])[:2000] if path in files else "not there"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (%(default)s)")
    args = parser.parse_args(arguments)
    wrong: list[str] = []
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as scratch:
            kills = -(-args.kills // len(COMMANDS))
            found = soak(name, kills, args.seed, Path(scratch))
            print(f"{name}: {kills} kills, {len(found)} differences", flush=True)
            wrong += found
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
