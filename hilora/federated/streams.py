"""Random streams that depend on what they are for, and not on the order in which things are done."""

from __future__ import annotations

import numpy as np
import torch


def stream(seed: int, purpose: str, *ids: int) -> torch.Generator:
    """A random stream of its own for each purpose and combination of ids, such as ("training", round, client)."""
    key = (*purpose.encode(), 256, *ids)  # 256 is no byte: no purpose runs into the ids
    entropy = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(entropy[0]))
