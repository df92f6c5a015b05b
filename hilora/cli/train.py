"""What the examples of federated training share: their arguments, a run of several strategies, and what they print."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population, partition
from hilora.federated.engine.device import quick_dtype
from hilora.federated.settings import TIERS, TrainingSettings
from hilora.federated.simulation import Simulation
from hilora.federated.strategies import STRATEGIES
from hilora.models.backbone import GLYPH_VIT, load_backbone, tune_for_cpu
from hilora.reporting.comparison import comparison_text

Check = Callable[[argparse.Namespace], None]
"""Raises an error where the data that are asked for cannot be there, before anything takes long."""

Load = Callable[[argparse.Namespace, int], tuple[ImageSet, ImageSet, Population]]
"""Reads the training and the test images, at a height and width, and divides them among clients."""

VIT = "vit_base_patch16_224.augreg_in21k"
_RUN = TrainingSettings()
CHOICES = {
    "head": ["follow", "global"],
    "groups": ["subspace", "kmeans", "random", "true"],
    "aggregation": ["product", "factors"],
    "schedule": ["constant", "linear", "cosine"],
}


def per_tier(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Reads one value, or one for each tier: `8` or `16,8,4`."""

    def read(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",")]
        if len(values) not in (1, len(TIERS)):
            raise argparse.ArgumentTypeError(
                f"one value, or one for each of {', '.join(TIERS)}: {text!r} has {len(values)}"
            )
        return values

    read.__name__ = f"{kind.__name__}[,{kind.__name__},{kind.__name__}]"
    return read


def option(text: str) -> tuple[str, float]:
    """Reads `name=1.5`."""
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None


def new_parser(description: str | None, add_data: Callable[[argparse._ArgumentGroup], None]) -> argparse.ArgumentParser:
    """A parser of what `add_data` adds to the group of the data, and of all that does not depend on those."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    add_data(data)
    _add(data, "unseen", "share of the clients that is held out (%(default)s)", type=float, default=0.2)
    _add(data, "images-per-client", "training images of each (all there are)", type=int)

    model = parser.add_argument_group("model")
    _add(model, "backbone", f"a model of timm, or {GLYPH_VIT} (%(default)s)", default=VIT)
    _add(model, "weights", "a local file of its weights; default: from timm's hub", type=Path)
    _add(model, "img-size", "height and width of the images (what the backbone was trained for)", type=int)
    _add(model, "rank", "of the adapters, one or one a tier (8)", type=per_tier(int))
    _add(model, "lora-alpha", "scale of a tier is this / rank (16)", type=per_tier(float))

    train = parser.add_argument_group("training")
    names = list(STRATEGIES)
    _add(train, "strategy", "one or several, to compare (hilora)", nargs="+", choices=names, default=["hilora"])
    _add(train, "published", "clustering and routing to the letter of the paper", action="store_true")
    _add(train, "rounds", "(15,20,15)", type=per_tier(int), metavar="ROOT,CLUSTER,LEAF")
    _add(train, "local-epochs", "in a round (%(default)s)", type=int)
    _add(train, "batch-size", "of one client (%(default)s)", type=int)
    _add(train, "lr", "of the adapters, one or one a tier (3e-3,3e-3,3e-4)", type=per_tier(float))
    _add(train, "head-lr", "of the head, likewise (1e-2,1e-2,1e-3)", type=per_tier(float))
    _add(train, "head", "follow the tier, or freeze it after the root", choices=CHOICES["head"])
    _add(train, "groups", "where HiLoRA's clusters come from (%(default)s)", choices=CHOICES["groups"])
    _add(train, "aggregation", "HiLoRA averages products, or A and B apart", choices=CHOICES["aggregation"])
    _add(train, "gamma", "weight of the orthogonality penalties (%(default)s)", type=float, default=0.1)
    _add(train, "clip-norm", "scale a client's gradient down to this norm (never)", type=float)
    _add(train, "schedule", "of the rates over a client's steps (%(default)s)", choices=CHOICES["schedule"])
    _add(train, "augment", "random crops, and flips where they keep the label", action="store_true")
    _add(train, "participation", "share of clients in a round (%(default)s)", type=float)
    _add(train, "k-min", "clusters, at least; 1: there may be no groups (1)", type=int)
    _add(train, "k-max", "clusters, at most (half as many as clients, at least 10)", type=int)
    own = ""
    _add(train, "options", f"a strategy's own ({own})", nargs="+", type=option, metavar="NAME=VALUE", default=[])
    _add(train, "evaluate-every", "so many rounds, and at the end of a stage; 0: only there (%(default)s)", type=int)
    _add(train, "seed", "of the partition and the training (%(default)s)", type=int)

    machine = parser.add_argument_group("machine and results")
    _add(machine, "device", "(%(default)s)", default="cuda" if torch.cuda.is_available() else "cpu")
    dtypes = ["auto", "float32", "bfloat16"]
    measured = "of the backbone; adapters are float32. auto: bfloat16 where it was measured to be quicker (%(default)s)"
    _add(machine, "dtype", measured, choices=dtypes, default="auto")
    _add(machine, "clients-at-once", "clients in one forward pass, at most (as many as there is room for)", type=int)
    _add(machine, "out", "folder for the results (%(default)s)", type=Path, default=Path("runs/latest"))
    _add(machine, "resume", "go on where the run in --out stopped", action="store_true")
    return parser


def _add(group: argparse._ArgumentGroup, name: str, help: str, **more: Any) -> None:
    """Adds an argument; one for a field of `RunConfig` has the name of the field, and its default."""
    field = name.replace("-", "_")
    default = {"default": getattr(_RUN, field)} if hasattr(_RUN, field) else {}
    group.add_argument(f"--{name}", help=help, **(default | more))


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The arguments, the process's own where they are None."""
    args = parser.parse_args(arguments)
    if len(set(args.strategy)) < len(args.strategy):
        parser.error("--strategy names one twice")
    return args


def divide(
    args: argparse.Namespace, train: ImageSet, test: ImageSet, scheme: str, clients: int, **options: Any
) -> tuple[ImageSet, ImageSet, Population]:
    """The images, and their partition as the arguments and the `options` of `partition` say."""
    population = partition(
        train,
        test,
        scheme,
        clients=clients,
        unseen=args.unseen,
        images_per_client=args.images_per_client,
        min_images=min(2, args.images_per_client or 2),
        seed=args.seed,
        **options,
    )
    return train, test, population


def run(args: argparse.Namespace, check: Check, load: Load) -> int:
    """Runs what was asked for and prints a table of the results, or in one line what was wrong; returns the exit code.

    Results of the first strategy are in `--out`, of others in folders inside.
    """
    summaries: list[dict[str, Any]] = []
    code = 0
    try:
        _run_strategies(args, check, load, summaries)
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; --resume goes on from here" if summaries else ""), file=sys.stderr)
        code = 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    if summaries:
        print(f"\n{comparison_text(summaries)}\n\nfiles: {args.out}")
    return code


def _run_strategies(args: argparse.Namespace, check: Check, load: Load, summaries: list[dict[str, Any]]) -> None:
    """Runs every strategy on the same population, and appends its summary, also where it is interrupted."""
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out {args.out} is a file: choose a folder")
    check(args)
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_for_cpu()
    given = {name: getattr(args, name) for name in vars(args) if name in TrainingSettings.model_fields}
    given = {k: v for k, v in given.items() if v is not None}
    config = TrainingSettings(**given)
    import logging

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    backbone = load_backbone(args.backbone, args.weights, args.img_size)
    dtype = quick_dtype(device, backbone.features) if args.dtype == "auto" else getattr(torch, args.dtype)
    train, test, population = load(args, backbone.size)
    print(
        f"{len(population.seen)} clients and {len(population.unseen)} unseen ones, {population.scheme}, on "
        f"{train.name} ({len(train)} images, {len(train.classes)} classes), {backbone.name} at {backbone.size} px, "
        f"{device}, {str(dtype).removeprefix('torch.')}",
        flush=True,
    )
    asked_for = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if not args.resume:
        pass
    for name in args.strategy:
        out = args.out if name == args.strategy[0] else args.out / name
        resume = args.resume and (name == args.strategy[0] or (out / "checkpoint.pt").exists())
        fields = STRATEGIES[name].Settings.model_fields
        offered = {
            **{k: v for k, v in vars(args).items() if v is not None},
            "gamma_root": args.gamma,
            "gamma_cluster": args.gamma,
            **dict(args.options),
        }
        strategy = STRATEGIES[name](**{k: v for k, v in offered.items() if k in fields})
        simulation = Simulation(
            strategy, config, backbone, train, test, population, out, device, dtype, resume=resume, arguments=asked_for
        )
        try:
            simulation.run()
        finally:
            summaries.append(simulation.summary())
