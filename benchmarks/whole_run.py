"""A whole run on real data, by the batched engine and by a loop over PEFT models: time, and accuracy, which must agree.

    python -m benchmarks.whole_run --data-dir DIR --weights deit_tiny_patch16_224.safetensors

Twenty clients of CIFAR-100 (`sc-dir`) train leaves and heads of their own for some rounds. Leaves a summary of
each, and a table of all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.federation import LEAVES, Federation, Round
from benchmarks.peers.peft_loop import PeftLoop
from benchmarks.timing import DEVICE
from hilora.federated.client import Models, Trained
from hilora.federated.data.partitions import partition
from hilora.federated.data.readers import read_images
from hilora.models.backbone import load_backbone, tune_for_cpu
from hilora.reporting.comparison import comparison_markdown, write_comparison
from hilora.reporting.machine import device_name, versions
from hilora.reporting.progress import say
from hilora.reporting.statistics import summarise
from hilora.reporting.summary import write_summary

MODEL = "deit_tiny_patch16_224"
Fit = Callable[[Models, int], Trained]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-100")
    parser.add_argument("--weights", type=Path, help=f"of {MODEL}; default: from timm's hub")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--images-per-client", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=Path("runs/whole_run"), help="of the summaries (%(default)s)")
    given = parser.parse_args(arguments)
    if DEVICE == "cpu":
        tune_for_cpu()
    device = torch.device(DEVICE)
    train, test = read_images(given.data_dir, given.img_size, 0)
    backbone = load_backbone(MODEL, given.weights, given.img_size)
    summaries = []
    for seed in given.seed:
        counts = {"clients": given.clients, "images_per_client": given.images_per_client}
        people = partition(train, test, "sc-dir", unseen=0.0, seed=seed, **counts)
        shares = [client.train for client in people.clients]
        shape = Round(MODEL, given.img_size, given.clients, given.images_per_client)
        federation = Federation(shape, device, backbone, train, shares, noise=0.0)
        judge = federation.engine(None, torch.float32)
        for name, (fit, dtype) in ways(federation).items():
            models, started = federation.models, perf_counter()
            for round in range(given.rounds):
                models = models.after(fit(models, round))
            seconds = perf_counter() - started
            found = summarise(judge.evaluate(test, [client.test for client in people.clients], models).correct)
            images = given.rounds * sum(map(len, shares))
            summary = {
                "strategy": name,
                "partition": people.scheme,
                "seed": seed,
                "data": train.name,
                "backbone": backbone.name,
                "dtype": str(dtype).removeprefix("torch."),
                "tiers": {"leaf": found},
                "final": found,
                "unseen": {"zero_leaf": None, "leaf": None},
                "clusters": None,
                "seconds": seconds,
                "images_per_second": images / seconds,
                "images": images,
                "rounds": given.rounds,
                "arguments": {"device": device_name(device), **versions("torch", "peft"), **counts},
            }
            summaries.append(summary)
            write_summary(given.out / f"seed{seed}" / name / "summary.json", summary)
            say(f"seed {seed}, {name}: {seconds:.1f} s")
    write_comparison(given.out, summaries)
    say(f"\n{comparison_markdown(summaries)}\n\nfiles: {given.out}")


def ways(federation: Federation) -> dict[str, tuple[Fit, torch.dtype]]:
    """How a round can be trained, and in which dtype."""
    quick = federation.quick
    ids = torch.arange(federation.shape.clients)
    nothing: Tensor = torch.full((len(ids),), torch.nan)

    def ours(size: int | None) -> Fit:
        engine = federation.engine(size, quick)
        return lambda models, round: engine.train(
            federation.images, federation.shares, models, LEAVES, ids, "training", round
        )

    def loop(tuned: bool) -> Fit:
        peft = PeftLoop(federation, tuned=tuned)

        def fit(models: Models, round: int) -> Trained:
            adapters, heads = peft.train(federation.images, federation.orders(round), models)
            return Trained(ids, {"leaf": adapters}, heads, None, nothing, nothing)

        return fit

    return {
        "hilora": (ours(None), quick),
        "hilora, one by one": (ours(1), quick),
        "PEFT loop": (loop(False), torch.float32),
        "PEFT loop, tuned": (loop(True), torch.bfloat16),
    }


if __name__ == "__main__":
    main()
