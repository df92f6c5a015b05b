"""A whole run on real data, by cohorts and by the loop over PEFT models: time, and accuracy, which must be the same.

    python -m benchmarks.whole_run --data-dir DIR --weights deit_tiny_patch16_224.safetensors

Twenty clients of CIFAR-100 (`sc-dir`) train leaves and heads of their own for some rounds. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor

from benchmarks.federation import Federation
from benchmarks.ledger import device_name
from benchmarks.peers.peft_loop import PeftLoop
from benchmarks.shapes import Round
from benchmarks.timing import DEVICE
from hilora.federated.data.partitions import partition
from hilora.federated.data.readers import read_images
from hilora.federated.engine.batched import Task
from hilora.federated.engine.device import quick_dtype
from hilora.federated.engine.state import Models, Trained
from hilora.models.backbone import load_backbone, tune_for_cpu
from hilora.reporting.metrics import summarise

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
    given = parser.parse_args(arguments)
    if DEVICE == "cpu":
        tune_for_cpu()
    device = torch.device(DEVICE)
    train, test = read_images(given.data_dir, given.img_size, 0)
    backbone = load_backbone(MODEL, given.weights, given.img_size)
    dtype = quick_dtype(device, backbone.features)
    size = f"{given.clients} clients x {given.images_per_client} images, {given.rounds} rounds"
    print(f"{size}, {MODEL} at {given.img_size} px, {device_name()}, torch {torch.__version__}, ours in {dtype}\n")
    print("| seed | by | seconds | images/s | accuracy: mean | worst tenth |\n|---|---|---|---|---|---|")
    for seed in given.seed:
        counts = {"clients": given.clients, "images_per_client": given.images_per_client}
        people = partition(train, test, "sc-dir", unseen=0.0, seed=seed, **counts)
        shares = [client.train for client in people.clients]
        shape = Round(MODEL, given.img_size, given.clients, given.images_per_client)
        federation = Federation(shape, device, backbone, train, shares, noise=0.0)
        judge = federation.cohort(None, torch.float32)
        for name, fit in ways(federation, dtype).items():
            models, started = federation.models, perf_counter()
            for round in range(given.rounds):
                models = models.replaced("leaf", fit(models, round))
            seconds = perf_counter() - started
            found = summarise(judge.evaluate(test, [client.test for client in people.clients], models).correct)
            images = given.rounds * sum(map(len, shares))
            accuracy = " | ".join(f"{100 * (found[key] or 0):.1f}" for key in ("mean", "tail"))
            print(f"| {seed} | {name} | {seconds:.1f} | {images / seconds:.0f} | {accuracy} |", flush=True)


def ways(federation: Federation, dtype: torch.dtype) -> dict[str, Fit]:
    """How a round can be trained."""
    ids = torch.arange(federation.shape.clients)
    nothing: Tensor = torch.full((len(ids),), torch.nan)

    def ours(size: int | None) -> Fit:
        cohort = federation.cohort(size, dtype)
        return lambda models, round: cohort.train(
            federation.images, federation.shares, models, Task("leaf"), ids, "training", round
        )

    def loop(tuned: bool) -> Fit:
        peft = PeftLoop(federation, tuned=tuned)

        def fit(models: Models, round: int) -> Trained:
            adapters, heads = peft.train(federation.images, federation.orders(round), models)
            return Trained(adapters, heads, nothing, nothing)

        return fit

    return {
        "hilora": ours(None),
        "hilora, one by one": ours(1),
        "PEFT loop": loop(False),
        "PEFT loop, tuned": loop(True),
    }


if __name__ == "__main__":
    main()
