"""GL-Dir: every client draws from all classes."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from hilora.federated.data.allocation import Bools
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.dealt import ALPHA, Dirichlet, Pools


class GlDir(Dirichlet):
    """Proportions are Dirichlet(alpha) over all classes; there are no true groups."""

    name: ClassVar[str] = "gl-dir"
    alpha: float = Field(default=0.3, gt=0, description=ALPHA)

    def pools(self, train: ImageSet, present: Bools, rng: np.random.Generator) -> Pools:
        return Pools(present[None])
