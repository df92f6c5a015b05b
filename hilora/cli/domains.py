"""Train root, cluster and leaf adapters of a ViT across federated clients whose images are of different domains.

The data are a folder per domain, with a folder per class inside it, such as PACS; DomainNet's lists of training and
test images are followed where they lie beside the domains. Every client has images of one domain, and the domains are
the true groups that the summary's clusters are compared with. With DomainNet in DIR, as in the paper:

    {prog} --data-dir DIR --classes 10 --device cuda --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from hilora.cli.training import Command, partition_asked, run
from hilora.errors import MissingFileError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Population, partition
from hilora.federated.data.readers import read_domains


def add_data(data: argparse._ArgumentGroup) -> None:
    data.add_argument("--data-dir", type=Path, required=True, help="a folder per domain, a folder per class inside it")
    data.add_argument("--classes", type=int, help="the largest so many (all; for DomainNet, the paper takes 10)")
    data.add_argument("--clients-per-domain", type=int, default=15, help="all of them (%(default)s)")


def check(args: argparse.Namespace) -> None:
    partition_asked(args, "domains", clients=args.clients_per_domain)
    if not args.data_dir.is_dir():
        raise MissingFileError(f"--data-dir: there is no folder {args.data_dir}: give one with a folder per domain")


def load(args: argparse.Namespace, size: int) -> tuple[ImageSet, ImageSet, Population]:
    train, test = read_domains(args.data_dir, size, args.seed, args.classes)
    clients = args.clients_per_domain * len(train.domain_names)
    return train, test, partition(train, test, partition_asked(args, "domains", clients=clients), seed=args.seed)


def command(prog: str) -> Command:
    assert __doc__ is not None
    return Command(prog, __doc__.format(prog=prog), add_data, {"local_epochs": 2}, without=["clients"])


def parser(prog: str) -> argparse.ArgumentParser:
    return command(prog).parser()


def main(arguments: Sequence[str] | None = None, prog: str = "hilora domains") -> int:
    return run(command(prog).parse(arguments), check, load)
