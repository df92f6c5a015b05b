"""What a long run holds in memory: `python -m tests.soak.memory --rounds 200,200,100`.

Trains a small run and notes the resident memory of the process after every round. Inside of a stage it must not
grow: the mean of the last tenth of its rounds is compared with that of the second tenth.
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
from pathlib import Path
from statistics import mean

import torch

from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.data.partitions import partition
from hilora.federated.data.readers import read_images
from hilora.federated.settings import TrainingSettings
from hilora.federated.simulation import Simulation
from hilora.models.backbone import load_backbone, tune_for_cpu

ALLOWED = 0.02


class Memory(Callback):
    """Resident bytes after every round, by stage."""

    name = "memory"

    def __init__(self) -> None:
        self.stages: dict[str, list[int]] = {}

    def commit(self, simulation: Simulation, round: Round) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.stages.setdefault(round.stage.tier, []).append(pages * resource.getpagesize())


def growth(taken: list[int]) -> float:
    """How much more the last tenth of the rounds holds than the second one, as a fraction."""
    tenth = max(1, len(taken) // 10)
    return mean(taken[-tenth:]) / mean(taken[tenth : 2 * tenth]) - 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", default="200,200,100", help="of root, cluster and leaf (%(default)s)")
    parser.add_argument("--clients", type=int, default=10)
    args = parser.parse_args(arguments)
    tune_for_cpu()
    train, test = read_images("glyphs", 32, 0)
    population = partition(train, test, "sc-dir", seed=0, clients=args.clients, images_per_client=32)
    rounds = [int(number) for number in args.rounds.split(",")]
    settings = TrainingSettings(rounds=rounds, participation=0.8, augment=True, evaluate_every=5)
    memory = Memory()
    with tempfile.TemporaryDirectory() as out:
        device, backbone = torch.device("cpu"), load_backbone("glyph_vit")
        Simulation("hilora", settings, backbone, train, test, population, Path(out), device, callbacks=[memory]).run()
    grown = {stage: growth(taken) for stage, taken in memory.stages.items()}
    for stage, taken in memory.stages.items():
        print(f"{stage}: {len(taken)} rounds, {taken[-1] / 2**20:.0f} MiB at the end, {grown[stage]:+.2%} inside")
    return 1 if any(value > ALLOWED for value in grown.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
