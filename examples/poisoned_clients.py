"""Two of eight clients send what they should not, and the server takes means by each rule.

On generated images, in some minutes on two cores: `python examples/poisoned_clients.py --seeds 3`. Prints, for each
method, rule and attack, the mean accuracy of the clients after their last round together.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hilora
from hilora.federated.client import ClientState
from hilora.federated.data.glyphs import load_glyphs
from hilora.federated.data.partitions import partition
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Upload
from hilora.federated.settings import TrainingSettings
from hilora.federated.simulation import Simulation
from hilora.models.backbone import load_backbone

RULES = ("none", "clip", "trimmed", "median")
ATTACKS = ("nobody", "labels", "reversed", "random")
ATTACKERS = 2


def reversed_tenfold(now: Tensor, before: Tensor, _: torch.Generator) -> Tensor:
    """What the client changed, times −10."""
    return before - 10 * (now - before)


def random_and_huge(now: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
    """Anything, a hundred times too large."""
    return now + 100 * torch.randn(now.shape, generator=generator).to(now)


FORGERIES = {"reversed": reversed_tenfold, "random": random_and_huge}


def poison(simulation: Simulation, attackers: Tensor, attack: str) -> None:
    """Have some clients of a simulation attack: with other labels, or with another message than they trained."""
    if attack == "labels":
        labels = simulation.train_images.labels
        for client in attackers.tolist():
            images = simulation.population.clients[client].train
            labels[images] = len(simulation.train_images.classes) - 1 - labels[images]
    elif attack in FORGERIES:
        forged = _forged(simulation.client.local, attackers, FORGERIES[attack])
        setattr(simulation.client, "local", forged)  # noqa: B010 -- a method of one object


def _forged(local: Callable[..., Upload], attackers: Tensor, change: Callable[..., Tensor]) -> Callable[..., Upload]:
    def sent(state: ClientState, download: Download, trainer: Trainer) -> Upload:
        upload, generator = local(state, download, trainer), torch.Generator().manual_seed(trainer.round)
        evil = torch.isin(upload.clients, attackers)

        def other(stack: Any, start: Any) -> Any:
            before = start.taken().tensors()
            found = {
                name: change(value, before[name], generator) if value.is_floating_point() else value
                for name, value in stack.tensors().items()
            }
            return stack.like(found).where(evil, stack)

        tiers = {tier: other(table, download.tiers[tier]) for tier, table in upload.tiers.items()}
        return replace(upload, tiers=tiers, head=None if upload.head is None else other(upload.head, download.head))

    return sent


def attacked(
    strategy: str, robust: str, attack: str, out: Path, seed: int = 0, **options: Any
) -> dict[str, Any] | None:
    """The summary of a run of ten clients, of whom eight train and two of these attack; None if it went to pieces."""
    train, test = load_glyphs()
    population = partition(train, test, "sc-dir", clients=10, images_per_client=30, test_images=20, seed=seed)
    shared = {"rounds": [8, 4, 0], "batch_size": 10, "unseen_epochs": 0, "evaluate_every": 0, "seed": seed}
    settings = TrainingSettings(**{**shared, "robust": robust, **options})
    images = (train, test, population)
    simulation = Simulation(strategy, settings, load_backbone("glyph_vit"), *images, out, torch.device("cpu"))
    poison(simulation, population.seen[-ATTACKERS:], attack)
    try:
        return simulation.run()
    except hilora.HiLoRAError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=["fedit", "hilora"])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    print("| method | mean |", " | ".join(ATTACKS), "|")
    print("| :-- | :-- |", " | ".join(["--:"] * len(ATTACKS)), "|")
    for strategy in args.strategies:
        for robust in RULES:
            cells = []
            for attack in ATTACKS:
                with tempfile.TemporaryDirectory() as out:
                    runs = [attacked(strategy, robust, attack, Path(out), seed) for seed in range(args.seeds)]
                reached = [run["final"]["mean"] if run else 0.0 for run in runs]
                cells.append(f"{statistics.mean(reached):.1%}" + ("" if all(runs) else " ✗"))
            print(f"| {strategy} | {robust} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
