"""Grouping of clients; a short name for `hilora.algorithms.clustering`."""

from hilora.algorithms.clustering import (
    Clustering,
    cluster_bases,
    cluster_clients,
    cluster_updates,
    ema_columns,
    ema_subspace,
    route_client,
)

__all__ = [
    "Clustering",
    "cluster_bases",
    "cluster_clients",
    "cluster_updates",
    "ema_columns",
    "ema_subspace",
    "route_client",
]
