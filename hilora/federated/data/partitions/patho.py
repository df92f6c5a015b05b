"""Patho: every client has a few classes only."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from hilora.federated.data.allocation import Bools
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.dealt import Dealt, Pools, check_each


class Patho(Dealt):
    """Equal shares of some classes, which are dealt out evenly; there are no true groups."""

    name: ClassVar[str] = "patho"
    classes_per_client: int = Field(default=10, ge=1, description="how many classes a client has")

    def pools(self, train: ImageSet, present: Bools, rng: np.random.Generator) -> Pools:
        classes = np.eye(len(present), dtype=bool)[present]
        check_each(self.classes_per_client, classes, "classes")
        return Pools(classes, self.classes_per_client)
