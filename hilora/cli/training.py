"""What commands that train clients share: their arguments, a run of several strategies, and what they print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch

from hilora.cli.fields import about, add_field, described, flag, made
from hilora.cli.methods import add_settings, chosen, load
from hilora.errors import HiLoRAError, InvalidValueError, MissingFileError, NotAFolderError
from hilora.federated.callbacks.checkpoint import checkpoint_dtype, has_checkpoint
from hilora.federated.callbacks.report import RESULTS
from hilora.federated.callbacks.tensorboard import TensorBoard
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import PARTITIONS, Partition, Population, settings
from hilora.federated.engine.device import DTYPES, find_device, quick_dtype
from hilora.federated.settings import TrainingSettings
from hilora.federated.simulation import Simulation
from hilora.federated.strategies import STRATEGIES
from hilora.files import clear_leftovers, plain, set_aside
from hilora.locks import claimed
from hilora.models.backbone import GLYPH_VIT, load_backbone, tune_for_cpu
from hilora.reporting.comparison import comparison_text, write_comparison
from hilora.reporting.progress import ending, on_terminal, say, silent, stopped

Check = Callable[[argparse.Namespace], None]
"""Raises an error where the data that are asked for cannot be there, before anything takes long."""

Load = Callable[[argparse.Namespace, int], tuple[ImageSet, ImageSet, Population]]
"""Reads the training and the test images, at a height and width, and divides them among clients."""

AUTO = "auto"
PER_TIER = "per tier: one value, or one for each of root, cluster, leaf, as in --rank 8 or --rank 16,8,4"
COMPARISON = ("comparison.md", "comparison.html", "comparison.json")
VIT = "vit_base_patch16_224.augreg_in21k"
SHARED = TrainingSettings.model_fields


class Command:
    """A command that trains clients.

    Args:
        prog: what the command is called in its help and its errors; None for the script's name.
        description: what it does when nothing is given, and examples.
        add_data: adds what is to be known of the data to a group of arguments.
        defaults: what suits the command better than the settings' own defaults.
        without: settings of partitions that the command takes from elsewhere.
    """

    def __init__(
        self,
        prog: str | None,
        description: str | None,
        add_data: Callable[[argparse._ArgumentGroup], None],
        defaults: Mapping[str, Any] | None = None,
        without: Sequence[str] = (),
    ) -> None:
        self.prog, self.description, self.add_data, self.without = prog, description, add_data, without
        self.defaults = {"strategy": ["hilora"], "backbone": VIT, "seed": 0, **(defaults or {})}

    def parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        """The arguments, the process's own where they are None. `strategy` has names, `kinds` the classes."""
        early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        early.add_argument("--strategy", nargs="+")
        asked = early.parse_known_args(arguments)[0].strategy or self.defaults["strategy"]
        parser = self.parser()
        try:
            kinds = [load(text) for text in asked]  # others than ours bring settings with them
            parser = self.parser()
        except HiLoRAError as error:
            parser.error(str(error))
        args = parser.parse_args(arguments)
        args.strategy, args.kinds = [kind.name or kind.__name__ for kind in kinds], kinds
        if len(set(args.strategy)) < len(args.strategy):
            parser.error("--strategy names one twice")
        return args

    def error(self, message: str) -> NoReturn:
        """End as argparse does where an argument is wrong."""
        self.parser().error(message)

    def parser(self) -> argparse.ArgumentParser:
        """The parser of its arguments."""
        parser = argparse.ArgumentParser(
            self.prog,
            usage="%(prog)s [options]",
            description=self.description,
            epilog="What stands in parentheses is the default.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        data = parser.add_argument_group("data")
        self.add_data(data)
        for name, fields in settings().items():
            if name not in self.without:
                others = [field.get_default() for field in fields]
                add_field(data, name, fields[0], described(fields[0], *self._default(name, *others)))
        model = parser.add_argument_group("model")
        model.add_argument("--backbone", help=f"a model of timm, or {GLYPH_VIT} ({self.defaults['backbone']})")
        model.add_argument("--weights", type=Path, help="a local file of its weights (from timm's hub)")
        model.add_argument("--img-size", type=int, help="height and width (what the backbone was trained for)")
        train = parser.add_argument_group("training", PER_TIER)
        default = " ".join(self.defaults["strategy"])
        names = f"one or several, to compare: {', '.join(STRATEGIES)}, or package.module:Class ({default})"
        train.add_argument("--strategy", nargs="+", metavar="METHOD", help=names)
        for name, field in SHARED.items():
            add_field(train, name, field, described(field, *self._default(name)))
        add_settings(parser)
        machine = parser.add_argument_group("machine and results")
        cuda = "cuda" if torch.cuda.is_available() else "cpu"
        machine.add_argument("--device", default=cuda, help="cpu, cuda, cuda:1, … (%(default)s)")
        measured = "of the backbone; adapters are float32. auto: bfloat16 where that is measured to be quicker"
        machine.add_argument(
            "--dtype",
            choices=[AUTO, *DTYPES],
            default=AUTO,
            help=f"{measured}, or what the run resumed was begun with (%(default)s)",
        )
        out = Path("runs/latest")
        machine.add_argument("--out", type=Path, default=out, help="folder for the results (%(default)s)")
        machine.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
        machine.add_argument(
            "--tensorboard", action="store_true", help="write every round for TensorBoard, too, into the run's folder"
        )
        machine.add_argument("--quiet", action="store_true", help="say nothing but what goes wrong")
        machine.add_argument("--json", action="store_true", help="print the summary as JSON, and nothing else")
        parser.set_defaults(**self.defaults)
        return parser

    def _default(self, name: str, *others: Any) -> tuple[Any, ...]:
        """What the command takes where a field is not given."""
        return (self.defaults[name],) if name in self.defaults else others


def partition_asked(args: argparse.Namespace, scheme: str, **given: Any) -> Partition:
    """The partition that the arguments ask for, with what is given beside them.

    Raises:
        InvalidValueError: for a setting that it does not have, or a value that does not fit.
    """
    fields = PARTITIONS[scheme].model_fields
    asked = {name: getattr(args, name) for name in settings() if hasattr(args, name)} | given
    for name in asked:
        having = [other for other, kind in PARTITIONS.items() if name in kind.model_fields]
        if name not in fields:
            raise InvalidValueError(f"{flag(name)} is for {', '.join(having)}: the partition is {scheme}")
    if "min_images" in fields and asked.get("images_per_client") == 1:
        asked.setdefault("min_images", 1)
    return made(PARTITIONS[scheme], asked)


def run(args: argparse.Namespace, check: Check, load_data: Load) -> int:
    """Runs what was asked for and prints a table of the results, or in one line what was wrong; returns the exit code.

    Results of a single strategy are in `--out`, those of several in folders inside, beside a table of all.
    """
    summaries: list[dict[str, Any]] = []

    def strategies() -> int:
        try:
            _run_strategies(args, check, load_data, summaries)
        except KeyboardInterrupt as error:
            return stopped(error, "; --resume goes on from here" if summaries else "")
        return 0

    with silent() if args.quiet or args.json else nullcontext(), on_terminal():
        code = ending(strategies)
        if summaries:
            if len(args.strategy) > 1:
                write_comparison(args.out, summaries)
            say(f"\n{comparison_text(summaries)}\n\nfiles: {args.out}")
    if args.json and summaries:
        say(json.dumps(plain(summaries if len(args.strategy) > 1 else summaries[0])))
    return code


def _run_strategies(args: argparse.Namespace, check: Check, load_data: Load, summaries: list[dict[str, Any]]) -> None:
    """Runs every strategy on the same population, and appends its summary, also where it is interrupted."""
    if args.out.exists() and not args.out.is_dir():
        raise NotAFolderError(f"--out {args.out} is a file: choose a folder")
    check(args)
    with claimed(args.out) as ours:
        if not ours:
            raise InvalidValueError(
                f"another process is writing to --out {args.out}: wait for it, or give another folder"
            )
        _train(args, load_data, summaries)


def _train(args: argparse.Namespace, load_data: Load, summaries: list[dict[str, Any]]) -> None:
    given = {name: value for name, value in vars(args).items() if name in SHARED}
    training, strategies = made(TrainingSettings, given), chosen(args, args.kinds)
    for strategy in strategies:
        strategy.check(training)
    folders = [args.out] if len(strategies) == 1 else [args.out / name for name in args.strategy]
    for folder in folders:
        clear_leftovers(folder)
    if args.resume and not any(map(has_checkpoint, folders)):
        raise MissingFileError(f"--resume: there is no checkpoint in {args.out}: start without it")
    trackers = [TensorBoard()] if args.tensorboard else []
    with about(device=args.device):
        device = find_device(args.device)
    if device.type == "cpu":
        tune_for_cpu()
    with about(backbone=args.backbone, weights=args.weights, img_size=args.img_size):
        backbone = load_backbone(args.backbone, args.weights, args.img_size)
    goes_on = args.resume and args.dtype == AUTO
    begun = next((checkpoint_dtype(folder) for folder in folders if has_checkpoint(folder)), None) if goes_on else None
    chosen_dtype = begun if args.dtype == AUTO else args.dtype
    dtype = quick_dtype(device, backbone.features) if chosen_dtype is None else DTYPES[chosen_dtype]
    train, test, population = load_data(args, backbone.size)
    say(
        f"{len(population.seen)} clients and {len(population.unseen)} unseen ones, {population.scheme}, on "
        f"{train.name} ({len(train)} images, {len(train.classes)} classes), {backbone.name} at {backbone.size} px, "
        f"{device}, {str(dtype).removeprefix('torch.')}{', as the checkpoint says' if begun else ''}"
    )
    asked_for = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    for name in ("kinds", "quiet", "json"):
        del asked_for[name]
    if not args.resume:
        set_aside(args.out, (*RESULTS, *COMPARISON))
        for folder in (args.out / name for name in STRATEGIES):
            set_aside(folder, RESULTS)
    for strategy, folder in zip(strategies, folders, strict=True):
        resume = args.resume and has_checkpoint(folder)
        simulation = Simulation(
            strategy, training, backbone, train, test, population, folder, device, dtype, resume, asked_for, trackers
        )
        try:
            simulation.run()
        finally:
            summaries.append(simulation.summary())
