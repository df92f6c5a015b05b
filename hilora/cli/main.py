"""The command `hilora`: a word says what to do, and the rest is that command's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from hilora.version import __version__

COMMANDS = {
    "train": ("hilora.cli.train", "train the clients of one data set and measure them; a demo where nothing is given"),
    "domains": ("hilora.cli.domains", "the same for images of several domains, such as PACS or DomainNet"),
    "experiment": ("hilora.experiments.__main__", "tables of many runs, from a TOML file: run, report, migrate"),
    "inspect": ("hilora.cli.inspect", "what is in a file or folder: adapters, checkpoints, runs, ledgers"),
    "compare": ("hilora.cli.compare", "runs side by side, with paired differences and a plot"),
    "merge": ("hilora.cli.merge", "one client's ViT as plain weights, its adapters merged into them"),
    "peft": ("hilora.cli.peft", "one client's adapters as a folder of PEFT's, or such a folder as adapters"),
    "env": ("hilora.cli.env", "versions, devices, and which kernels serve; to paste into a bug report"),
    "completion": ("hilora.cli.completion", "completion of commands and flags for a shell"),
}
"""The module of each command, which has `main(arguments, prog)`, and what it does in a line; loaded when it is used."""


def listing() -> argparse.ArgumentParser:
    """A parser that knows the commands by name alone."""
    parser = argparse.ArgumentParser(
        "hilora",
        description="Hierarchical low-rank adapters for Vision Transformers of many clients.",
        epilog="hilora COMMAND --help says the rest. In Python: import hilora.",
    )
    parser.add_argument("--version", action="version", version=f"hilora {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (_, words) in COMMANDS.items():
        commands.add_parser(name, help=words, add_help=False)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        listing().print_help()
        return 0
    if arguments[0] not in COMMANDS:
        listing().parse_args(arguments)
    name = arguments[0]
    try:
        command = import_module(COMMANDS[name][0])
    except ModuleNotFoundError as error:
        if (error.name or "hilora").startswith("hilora"):
            raise
        print(f"hilora {name} needs {error.name}: pip install 'hilora[federated]'", file=sys.stderr)
        return 2
    code: int = command.main(arguments[1:], prog=f"hilora {name}")
    return code
