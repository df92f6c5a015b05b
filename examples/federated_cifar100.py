"""Train root, cluster and leaf adapters of a ViT across federated clients, and measure them as the HiLoRA paper does.

With no arguments this runs on what comes with the package: generated glyph images and a small ViT, about a minute on
two cores. On real data, as in the paper:

    python examples/federated_cifar100.py --data-dir DIR --download --partition sc-dir --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hilora.federated.backbone import GLYPH_VIT, load_backbone, tune_for_cpu
from hilora.federated.capacity import quick_dtype
from hilora.federated.data import ImageSet
from hilora.federated.partition import partition
from hilora.federated.readers import download_cifar100, read_images
from hilora.federated.report import table
from hilora.federated.settings import SCHEDULES, TIERS, RunConfig
from hilora.federated.simulation import Simulation, set_aside
from hilora.federated.strategies import STRATEGIES

# What suits the two cases: (glyphs and the small ViT, real images and a pretrained ViT).
DEFAULTS: dict[str, tuple[Any, Any]] = {
    "strategy": (["hilora", "fedit", "local-lora"], ["hilora"]),
    "backbone": (GLYPH_VIT, "vit_base_patch16_224.augreg_in21k"),
    "clients": (25, 100),
    "images_per_client": (96, None),
    "rounds": ([4, 6, 4], [15, 20, 15]),
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


def parse(arguments: list[str] | None) -> argparse.Namespace:
    run = RunConfig()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-dir",
        type=Path,
        help="CIFAR-100 (binary or python), or a folder of images by class; default: generated glyphs",
    )
    data.add_argument("--download", action="store_true", help="fetch CIFAR-100 into --data-dir first")
    data.add_argument("--partition", choices=["sc-dir", "gl-dir", "patho"], default="sc-dir")
    data.add_argument("--clients", type=int, help="all of them (100; glyphs: 25)")
    data.add_argument("--unseen", type=float, default=0.2, help="share of the clients that is held out (%(default)s)")
    data.add_argument("--images-per-client", type=int, help="training images of each (all there are; glyphs: 96)")
    model = parser.add_argument_group("model")
    model.add_argument("--backbone", help=f"a model of timm ({DEFAULTS['backbone'][1]}), or {GLYPH_VIT}")
    model.add_argument("--weights", type=Path, help="a local file of its weights; default: from timm's hub")
    model.add_argument(
        "--img-size", type=int, help="height and width of the images (what the backbone was trained for)"
    )
    model.add_argument("--rank", type=per_tier(int), default=run.rank, help="of the adapters, one or one a tier (8)")
    model.add_argument(
        "--lora-alpha", type=per_tier(float), default=run.lora_alpha, help="scale of a tier is this / rank (16)"
    )
    train = parser.add_argument_group("training")
    train.add_argument(
        "--strategy", nargs="+", choices=list(STRATEGIES), help="one or several, to compare (hilora; glyphs: all)"
    )
    train.add_argument("--published", action="store_true", help="clustering and routing to the letter of the paper")
    train.add_argument("--rounds", type=per_tier(int), metavar="ROOT,CLUSTER,LEAF", help="(15,20,15; glyphs: 4,6,4)")
    train.add_argument("--local-epochs", type=int, default=run.local_epochs, help="in a round (%(default)s)")
    train.add_argument("--batch-size", type=int, default=run.batch_size, help="of one client (%(default)s)")
    train.add_argument(
        "--lr", type=per_tier(float), default=run.lr, help="of the adapters, one or one a tier (3e-3,3e-3,3e-4)"
    )
    train.add_argument(
        "--head-lr", type=per_tier(float), default=run.head_lr, help="of the head, likewise (1e-2,1e-2,1e-3)"
    )
    train.add_argument(
        "--head", choices=["follow", "global"], default=run.head, help="follow the tier, or freeze it after the root"
    )
    train.add_argument(
        "--gamma", type=float, default=run.gamma_root, help="weight of the orthogonality penalties (%(default)s)"
    )
    train.add_argument("--clip-norm", type=float, help="scale a client's gradient down to this norm (never)")
    train.add_argument(
        "--schedule", choices=SCHEDULES, default=run.schedule, help="of the rates over a client's steps (%(default)s)"
    )
    train.add_argument("--augment", action="store_true", help="random crops, and flips where they keep the label")
    train.add_argument(
        "--participation", type=float, default=run.participation, help="share of clients in a round (%(default)s)"
    )
    train.add_argument("--k-min", type=int, default=run.k_min, help="clusters, at least; 1: there may be no groups (1)")
    train.add_argument("--k-max", type=int, help="clusters, at most (half as many as clients, at least 10)")
    train.add_argument("--seed", type=int, default=run.seed, help="of the partition and the training (%(default)s)")
    machine = parser.add_argument_group("machine and results")
    machine.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    machine.add_argument(
        "--dtype",
        choices=["auto", "float32", "bfloat16"],
        default="auto",
        help="of the backbone; adapters are float32. auto: bfloat16 where it was measured to be quicker (%(default)s)",
    )
    machine.add_argument(
        "--cohort-size", type=int, help="clients in one forward pass, at most (as many as there is room for)"
    )
    machine.add_argument("--out", type=Path, default=Path("runs/latest"), help="folder for the results (%(default)s)")
    machine.add_argument("--resume", action="store_true", help="go on where the run in --out stopped")
    args = parser.parse_args(arguments)
    for name, (embedded, real) in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, embedded if args.data_dir is None else real)
    if len(set(args.strategy)) < len(args.strategy):
        parser.error("--strategy names one twice")
    if args.download and args.data_dir is None:
        parser.error("--download needs a --data-dir to put CIFAR-100 into")
    return args


def load_data(args: argparse.Namespace, size: int) -> tuple[ImageSet, ImageSet]:
    if args.data_dir is None:
        from hilora.federated.glyphs import load_glyphs

        return load_glyphs(args.seed)
    if args.download:
        download_cifar100(args.data_dir)
    return read_images(args.data_dir, size, args.seed)


def run_strategies(args: argparse.Namespace, summaries: list[dict[str, Any]]) -> None:
    """Run every strategy on the same population. Results of the first are in `--out`, of others in folders inside."""
    if args.out.exists() and not args.out.is_dir():
        raise NotADirectoryError(f"--out {args.out} is a file: choose a folder")
    if args.data_dir is not None and not args.download and not args.data_dir.is_dir():
        raise FileNotFoundError(f"there is no folder {args.data_dir}: give one with CIFAR-100 or images, or --download")
    device = torch.device(args.device)
    if device.type == "cpu":
        tune_for_cpu()
    config = RunConfig(
        **{name: getattr(args, name) for name in vars(args) if name in RunConfig.__dataclass_fields__},
        gamma_root=args.gamma,
        gamma_cluster=args.gamma,
    )
    backbone = load_backbone(args.backbone, args.weights, args.img_size)
    dtype = quick_dtype(device, backbone.features) if args.dtype == "auto" else getattr(torch, args.dtype)
    train, test = load_data(args, backbone.size)
    population = partition(
        train,
        test,
        args.partition,
        clients=args.clients,
        unseen=args.unseen,
        images_per_client=args.images_per_client,
        min_images=min(2, args.images_per_client or 2),
        seed=args.seed,
    )
    print(
        f"{len(population.seen)} clients and {len(population.unseen)} unseen ones, {args.partition}, on {train.name} "
        f"({len(train)} images, {len(train.classes)} classes), {backbone.name} at {backbone.size} px, {device}, "
        f"{str(dtype).removeprefix('torch.')}",
        flush=True,
    )
    asked_for = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    if not args.resume:
        for folder in (args.out, *(args.out / name for name in STRATEGIES)):
            set_aside(folder)
    for name in args.strategy:
        out = args.out if name == args.strategy[0] else args.out / name
        resume = args.resume and (name == args.strategy[0] or (out / "checkpoint.pt").exists())
        simulation = Simulation(
            name,
            config,
            backbone,
            train,
            test,
            population,
            out,
            device,
            dtype,
            resume,
            asked_for,
        )
        try:
            simulation.run()
        finally:
            summaries.append(simulation.summary())


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    summaries: list[dict[str, Any]] = []
    code = 0
    try:
        run_strategies(args, summaries)
    except KeyboardInterrupt:
        print("\ninterrupted" + ("; --resume goes on from here" if summaries else ""), file=sys.stderr)
        code = 130
    except (ValueError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    if summaries:
        print(f"\n{table(summaries)}\n\nfiles: {args.out}")
    return code


if __name__ == "__main__":
    sys.exit(main())
