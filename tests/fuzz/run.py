"""Damage files and read them: `python -m tests.fuzz.run --files 2000 --seed 0` (`make fuzz`).

Whatever a file has become, no code that it brings is run, nothing hangs, no more than 2 GiB are taken, and the answer
is an error of the library that names the file, or what the whole file says. Files without a checksum may also say
something else. Each kind of file is read in a process of its own, under a limit of memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

from hilora.errors import HiLoRAError
from tests.fuzz.mutation import mutated
from tests.fuzz.targets import MARK, TARGETS, Target, quietly

GIBIBYTE = 2**30
SECONDS = 20  # that a file may take
REFUSED, EQUAL, OTHER = "refused", "equal", "says something else"


class Hang(Exception):
    """A file takes longer than any should."""


def verdict(target: Target, path: Path, whole: Any) -> str:
    """What became of a file: REFUSED, EQUAL or OTHER, or what should not be."""
    try:
        found = quietly(target.read, path)
    except HiLoRAError as error:
        if isinstance(error.__cause__, MemoryError) or isinstance(error.__context__, MemoryError):
            return f"takes all memory: {error}"
        named = path.name in str(error) or str(path.parent) in str(error)
        return REFUSED if named else f"an error that does not name the file: {error}"
    except Exception:
        return f"another error: {traceback.format_exc()}"
    if found == whole:
        return EQUAL
    return "is read as something else, in silence" if target.checked else OTHER


def examine(name: str, seed: int, files: int) -> tuple[Counter[str], list[str]]:
    """How often each verdict came, and what should not be, with the number of its file."""
    target, counts, wrong = TARGETS[name], Counter[str](), list[str]()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        (Path(scratch) / "data").mkdir()
        path = target.make(Path(scratch) / "data")
        content = path.read_bytes()
        whole = None if target.refused else quietly(target.read, path)
        for number in range(files):
            path.write_bytes(mutated(content, random.Random(f"{name} {seed} {number}")))
            signal.alarm(SECONDS)
            said = verdict(target, path, whole)
            signal.alarm(0)
            if Path(MARK).exists():
                said = "code of the file has run"
                Path(MARK).rmdir()
            counts[said if said in (REFUSED, EQUAL, OTHER) else "WRONG"] += 1
            if said not in (REFUSED, EQUAL, OTHER):
                wrong.append(f"{name}, seed {seed}, file {number}: {said}")
    return counts, wrong


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang(f"longer than {SECONDS} s")


def _child(name: str, seed: int, files: int, send: Any) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2 * GIBIBYTE,) * 2)
    signal.signal(signal.SIGALRM, _hang)
    send.send(examine(name, seed, files))


def confined(name: str, seed: int, files: int) -> tuple[Counter[str], list[str]]:
    """`examine` in a process that may take 2 GiB more than it begins with."""
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    child = fork.Process(target=_child, args=(name, seed, files, send))
    child.start()
    send.close()
    try:
        found: tuple[Counter[str], list[str]] = receive.recv()
    except EOFError:
        child.join()
        return Counter({"WRONG": 1}), [f"{name}, seed {seed}: the process died, exit code {child.exitcode}"]
    child.join()
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="in all, over the kinds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (%(default)s)")
    args = parser.parse_args(arguments)
    each, wrong = -(-args.files // len(TARGETS)), list[str]()
    columns = (REFUSED, EQUAL, OTHER, "WRONG")
    print(f"{'':30}" + "".join(f"{column:>22}" for column in columns))
    for name in TARGETS:
        counts, found = confined(name, args.seed, each)
        print(f"{name:30}" + "".join(f"{counts[column]:22}" for column in columns), flush=True)
        wrong += found
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
