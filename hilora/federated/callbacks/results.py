"""What a run leaves in its folder, and the groups that it found."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hilora.federated.data.partitions import Population
from hilora.federated.strategies import Strategy

PICTURES = ("accuracy.png", "clusters.png", "classes.png")
RESULTS = ("summary.json", "metrics.jsonl", "checkpoint.pt", "adapters.safetensors", "heads.safetensors", *PICTURES)


def clusters(strategy: Strategy, population: Population) -> dict[str, Any] | None:
    """The groups that a strategy formed: K, the cluster of each seen client, their agreement with the true groups where
    these are known, and the cluster that each unseen client joined."""
    labels, truth = strategy.joined(population.seen), population.true_groups
    if (labels < 0).any():
        return None
    ari = None
    if truth is not None:
        from sklearn.metrics import adjusted_rand_score

        ari = float(adjusted_rand_score(truth[population.seen], labels))
    joined = strategy.joined(population.unseen).tolist()
    return {"k": len(labels.unique()), "labels": labels.tolist(), "ari": ari, "unseen": joined}


def set_aside(out: Path) -> None:
    """Move the results of an earlier run in a folder into `earlier-1`, `earlier-2`, … inside of it."""
    found = [out / name for name in RESULTS if (out / name).exists()]
    if found:
        number = next(n for n in itertools.count(1) if not (out / f"earlier-{n}").exists())
        (out / f"earlier-{number}").mkdir()
        for path in found:
            path.rename(out / f"earlier-{number}" / path.name)
