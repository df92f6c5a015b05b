"""The groups that a run formed, and how right they are."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def clusters(labels: Tensor | None, unseen: Tensor | None, truth: Tensor | None) -> dict[str, Any] | None:
    """K, the cluster of each seen client, their agreement with the true groups where these are known (the adjusted
    Rand index), and the cluster that each unseen client joined.

    Args:
        labels: int64 `[n]`, -1 for none; None where the method forms no groups.
        unseen: int64 `[m]`, the same for the unseen clients, or None.
        truth: int64 `[n]`, or None.
    """
    if labels is None or (labels < 0).any():
        return None
    ari = None
    if truth is not None:
        from sklearn.metrics import adjusted_rand_score

        ari = float(adjusted_rand_score(truth, labels))
    joined = [] if unseen is None else unseen.tolist()
    return {"k": len(labels.unique()), "labels": labels.tolist(), "ari": ari, "unseen": joined}
