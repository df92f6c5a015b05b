"""Adapters to and from the folders that PEFT reads and writes.

    hilora peft export runs/demo/hilora --client 3 --out client-3
    hilora peft import client-3 --backbone glyph_vit --classes 50 --out adapters.safetensors

What export writes is loaded by peft.PeftModel.from_pretrained(MODEL, "client-3") on the plain ViT; what import writes,
by hilora.load_adapters(MODEL, "adapters.safetensors").
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from hilora.adapters.injection import inject
from hilora.adapters.io.files import read_tensors
from hilora.adapters.io.from_peft import config_of, import_peft
from hilora.adapters.io.native import load_adapters, save_adapters
from hilora.adapters.io.peft import export_peft
from hilora.cli.fields import about
from hilora.errors import InvalidValueError
from hilora.federated.finished import with_classifier, with_path
from hilora.reporting.progress import ending, say


def parser(prog: str) -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=raw)
    commands = found.add_subparsers(dest="command", required=True, metavar="{export,import}")
    words = "Write a client's path through the tiers as one adapter of PEFT's, exactly or cut to a rank."
    out = commands.add_parser("export", help="adapters for PEFT", description=words)
    out.add_argument("source", type=Path, metavar="RUN_OR_FILE", help="the folder of a run, or adapters.safetensors")
    out.add_argument("--client", type=int, help="of a run: its id, from 0 on")
    out.add_argument(
        "--slot", action="append", default=[], type=_slot, metavar="TIER=N", help="of a file: one for each tier"
    )
    out.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="to be made, or to write into")
    out.add_argument("--rank", type=int, help="cut each layer's adapter down to this rank (exact)")
    out.add_argument("--backbone", help="of a file; of a run where its summary does not say it")
    _add_base(out)
    words = "Read a LoRA adapter that PEFT saved into the first adapter of a tier."
    into = commands.add_parser("import", help="an adapter of PEFT's", description=words)
    into.add_argument("source", type=Path, metavar="FOLDER", help="with adapter_config.json")
    into.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file of adapters to write")
    into.add_argument("--tier", default="root", help="which one it becomes (%(default)s)")
    into.add_argument("--backbone", required=True, help="a model of timm, or glyph_vit")
    into.add_argument("--classes", type=int, default=0, help="of the classifier that the folder has (none)")
    _add_base(into)
    return found


def _add_base(command: argparse.ArgumentParser) -> None:
    command.add_argument("--weights", type=Path, help="of the backbone, where they are not the ones that come with it")
    command.add_argument("--img-size", type=int, help="of the backbone, where it is not its own")


def _slot(text: str) -> tuple[str, int]:
    tier, _, number = text.partition("=")
    if not tier or not number.removeprefix("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected TIER=N, such as leaf=3, got {text!r}")
    return tier, int(number)


def _plain(args: argparse.Namespace, classes: int) -> nn.Module:
    with about(backbone=args.backbone, weights=args.weights):
        return with_classifier(args.backbone, args.weights, args.img_size, classes)


def _of_file(path: Path, args: argparse.Namespace) -> tuple[nn.Module, dict[str, int]]:
    """The ViT with a file's adapters, and the slots that were asked for."""
    if args.backbone is None:
        raise InvalidValueError(f"{path} does not say how its backbone is called: give --backbone")
    tensors, _ = read_tensors(path)
    head = next((len(value) for name, value in tensors.items() if name.startswith("head.")), 0)
    return load_adapters(_plain(args, head), path), dict(args.slot)


def _export(args: argparse.Namespace) -> int:
    if args.source.is_dir():
        if args.client is None or args.slot:
            raise InvalidValueError(f"{args.source} is of a run: give --client, and no --slot")
        model, slots = with_path(args.source, args.client, args.backbone, args.weights)
    else:
        if args.client is not None:
            raise InvalidValueError(f"{args.source} does not say which adapters are whose: give --slot TIER=N for each")
        model, slots = _of_file(args.source, args)
    lost = export_peft(model, args.out, rank=args.rank, stacked=True, **slots)
    say(f"{args.out}: " + (f"all but {lost:.2%} of the updates of the weights" if lost else "exact"))
    return 0


def _import(args: argparse.Namespace) -> int:
    config = config_of(args.source)
    model = inject(_plain(args, args.classes), config)
    import_peft(model, args.source, tier=args.tier)
    save_adapters(model, args.out)
    say(f"{args.out}: {len(config.target_modules)} layers of rank up to {config.r}, as {args.tier}")
    return 0


def main(arguments: Sequence[str] | None = None, prog: str = "hilora peft") -> int:
    args = parser(prog).parse_args(arguments)
    return ending(lambda: {"export": _export, "import": _import}[args.command](args))
