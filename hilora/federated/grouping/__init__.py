"""How clusters of clients come about, one file a way."""

from hilora.federated.grouping.kmeans import KMeansGrouping
from hilora.federated.grouping.oracle import OracleGrouping
from hilora.federated.grouping.random import RandomGrouping
from hilora.federated.grouping.subspace import GroupingSettings, SubspaceGrouping

GROUPINGS: dict[str, type[SubspaceGrouping]] = {
    "subspace": SubspaceGrouping,
    "kmeans": KMeansGrouping,
    "random": RandomGrouping,
    "true": OracleGrouping,
}

__all__ = ["GROUPINGS", "GroupingSettings", "SubspaceGrouping"]
