"""SC-Dir: every client has the classes of one superclass, which is its true group."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from hilora.federated.data.allocation import Bools
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.base import require
from hilora.federated.data.partitions.dealt import ALPHA, Dirichlet, Pools, check_each


class ScDir(Dirichlet):
    """Proportions are Dirichlet(alpha) over the classes of the client's superclass; superclasses are dealt out evenly.

    With more than one superclass a client there are no true groups.
    """

    name: ClassVar[str] = "sc-dir"
    alpha: float = Field(default=3.0, gt=0, description=ALPHA)
    superclasses_per_client: int = Field(default=1, ge=1, description="how many superclasses a client has")
    superclasses: int | None = Field(
        default=None,
        ge=1,
        description="how many are in use; by default one for every five clients, as far as there are so many",
    )

    def pools(self, train: ImageSet, present: Bools, rng: np.random.Generator) -> Pools:
        each, groups = self.superclasses_per_client, np.full(len(present), -1)
        if train.groups is not None:
            groups = train.groups.cpu().numpy()
        known = np.unique(groups[present & (groups >= 0)])
        require(len(known) > 0, f"sc-dir needs superclasses and {train.name} has none: use gl-dir or patho")
        wanted = self.superclasses
        count = min(max(each, self.clients // 5), len(known)) if wanted is None else wanted
        expected = f"1 to {len(known)}, as many as {train.name} has"
        require(1 <= count <= len(known), f"superclasses is {count}, expected {expected}")
        can = self.clients * each
        require(count <= can, f"superclasses={count} are more than {self.clients} clients can have")
        used = np.sort(rng.choice(known, count, replace=False))
        pools = (groups == used[:, None]) & present
        check_each(each, pools, "superclasses")
        return Pools(pools, each, tuple(train.group_names[group] for group in used))
