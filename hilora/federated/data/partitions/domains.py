"""Domains: every client has images of one domain, such as photos or sketches, which is its true group."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from pydantic import Field

from hilora.federated.data.allocation import Bools, Ints
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions.base import require
from hilora.federated.data.partitions.dealt import ALPHA, Cells, Dirichlet, Pools


class Domains(Dirichlet):
    """Proportions are Dirichlet(alpha) over the classes of the client's domain; domains are dealt out evenly."""

    name: ClassVar[str] = "domains"
    alpha: float = Field(default=0.6, gt=0, description=ALPHA)

    def cells(self, train: ImageSet, test: ImageSet) -> Cells:
        """A class in a domain, `domain * classes + class`."""
        other = "read it with read_domains, or use another scheme"
        require(train.domain_names != (), f"domains needs images with domains and {train.name} has none: {other}")
        same = train.domain_names == test.domain_names
        require(same, "the training and the test set differ in domains, expected the same")
        return Cells(_cells(train), _cells(test), len(train.classes) * len(train.domain_names))

    def pools(self, train: ImageSet, present: Bools, rng: np.random.Generator) -> Pools:
        domains = np.arange(len(present)) // len(train.classes)  # [C], of each cell
        used = np.unique(domains[present])
        needed = f"expected one for each of {len(used)} domains at least"
        require(len(used) <= self.clients, f"clients is {self.clients}, {needed}")
        names = tuple(train.domain_names[domain] for domain in used)
        return Pools((domains == used[:, None]) & present, names=names)


def _cells(images: ImageSet) -> Ints:
    assert images.domains is not None  # it has names of domains
    return (images.domains * len(images.classes) + images.labels).cpu().numpy()
