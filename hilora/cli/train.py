"""Train root, cluster and leaf adapters of a ViT across federated clients, and measure them as the HiLoRA paper does.

With no arguments this runs on what comes with the package: generated glyph images and a small ViT, about a minute on
two cores, for 25 clients of 96 images, in 4,6,4 rounds, with three strategies. On real data, as in the paper:

    {prog} --data-dir DIR --download --partition sc-dir --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hilora.cli.training import Command, partition_asked, run
from hilora.errors import MissingFileError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import PARTITIONS, Population, partition
from hilora.federated.data.readers import download_cifar100, read_images
from hilora.models.backbone import GLYPH_VIT

# What suits glyphs and the small ViT, in place of what suits real images and a pretrained ViT.
GLYPHS: dict[str, Any] = {
    "strategy": ["hilora", "fedit", "local-lora"],
    "backbone": GLYPH_VIT,
    "clients": 25,
    "images_per_client": 96,
    "rounds": [4, 6, 4],
}


def add_data(data: argparse._ArgumentGroup) -> None:
    images = "CIFAR-100 (binary or python), or a folder of images by class (generated glyphs)"
    data.add_argument("--data-dir", type=Path, help=images)
    data.add_argument("--download", action="store_true", help="fetch CIFAR-100 into --data-dir first")
    help = "who has which images (%(default)s)"
    data.add_argument("--partition", choices=list(PARTITIONS), default="sc-dir", help=help)


def check(args: argparse.Namespace) -> None:
    partition_asked(args, args.partition)
    if args.data_dir is not None and not args.download and not args.data_dir.is_dir():
        raise MissingFileError(
            f"--data-dir: there is no folder {args.data_dir}: give one with CIFAR-100 or images, or --download"
        )


def load(args: argparse.Namespace, size: int) -> tuple[ImageSet, ImageSet, Population]:
    if args.download:
        download_cifar100(args.data_dir)
    train, test = read_images("glyphs" if args.data_dir is None else args.data_dir, size, args.seed)
    return train, test, partition(train, test, partition_asked(args, args.partition), seed=args.seed)


def command(prog: str, glyphs: bool = True) -> Command:
    assert __doc__ is not None
    return Command(prog, __doc__.format(prog=prog), add_data, GLYPHS if glyphs else {"clients": 100})


def parser(prog: str) -> argparse.ArgumentParser:
    return command(prog).parser()


def main(arguments: Sequence[str] | None = None, prog: str = "hilora train") -> int:
    where = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    where.add_argument("--data-dir")
    glyphs = where.parse_known_args(arguments)[0].data_dir is None
    train = command(prog, glyphs)
    args = train.parse(arguments)
    if args.download and glyphs:
        train.error("--download needs a --data-dir to put CIFAR-100 into")
    return run(args, check, load)
