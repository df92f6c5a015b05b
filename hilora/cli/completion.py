"""Print what completes the commands and flags of hilora in a shell. For bash, put this into ~/.bashrc:

    eval "$(hilora completion bash)"

For zsh, write the output to a file `_hilora` in a folder of $fpath; for tcsh, eval it as in bash.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

from hilora.cli.main import COMMANDS
from hilora.reporting.progress import ending


def everything() -> argparse.ArgumentParser:
    """A parser of all commands with all of their flags."""
    parser = argparse.ArgumentParser("hilora")
    parser.add_argument("--version", action="store_true", help="which version this is")
    commands = parser.add_subparsers()
    for name, (module, words) in COMMANDS.items():
        own = import_module(module).parser(f"hilora {name}")
        commands.add_parser(name, help=words, parents=[own], conflict_handler="resolve")
    return parser


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which one is in use")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "hilora completion") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        import shtab

        print(shtab.complete(everything(), args.shell))
        return 0

    return ending(work)
