"""Say what is in files and folders, and what can be done with them: adapters, checkpoints, runs and their summaries,
metrics, ledgers, experiments, adapters of PEFT. Nothing that is read is run, and no tensor is loaded.

    hilora inspect runs/demo/hilora
    hilora inspect adapters.safetensors --json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from hilora.cli.contents import contents
from hilora.files import plain
from hilora.reporting.progress import ending, say


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("path", type=Path, nargs="+", metavar="PATH", help="a file, or the folder of a run")
    found.add_argument("--json", action="store_true", help="a JSON object a path, one line each")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "hilora inspect") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        for number, path in enumerate(args.path):
            found = contents(path)
            if args.json:
                say(json.dumps(plain({"path": path, **found.plain()})))
            else:
                say(f"{chr(10) if number else ''}{path}: {found.text()}")
        return 0

    return ending(work)
