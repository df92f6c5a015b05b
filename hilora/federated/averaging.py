"""How the server takes means of what clients sent: the one place where the setting `robust` acts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable, Stack
from hilora.algorithms.aggregation import product_space_mean
from hilora.algorithms.robust import (
    clipping_scales,
    distances,
    geometric_median_weights,
    product_distances,
    trimmed_mean,
    trimmed_product_mean,
)
from hilora.federated.coverage import covered_mean, filled
from hilora.federated.settings import TrainingSettings

S = TypeVar("S", bound=Stack)


@dataclass(frozen=True)
class Averaging:
    """Means by the rule that the settings name.

    `none` weighs by images. The others count all clients with images alike, for a number of images is a claim:

    - `clip`: what a client changed is scaled down to `robust_bound`, or to the median of the clients' norms; then the
      mean.
    - `trimmed`: the coordinate-wise trimmed mean.
    - `median`: the geometric median. Unlike the coordinate-wise one, which `trimmed` comes to with a `robust_trim` of
      nearly ½, it does not depend on the basis, is a weighted mean of the updates and thus of low rank, and is found
      from the factors alone.

    Adapters and heads are means of their own: each is clipped, trimmed or weighed by itself.
    """

    settings: TrainingSettings

    def mean(self, rows: S, weights: Tensor, start: Stack) -> S:
        """The mean tensor by tensor, as one row `[1, ...]`.

        Args:
            rows: what n clients sent.
            weights: how many images each has, `[n]`, not all zero.
            start: what they started from, one row or n.
        """
        if self.settings.robust == "none":
            return rows.mean(weights)
        rows, start = _with_images(rows, weights, start)
        if self.settings.robust == "trimmed":
            alike = rows.mean(torch.ones(len(rows))).tensors()  # with the rank that a mean has
            trim = self.settings.robust_trim
            return rows.like({name: _trimmed(value, trim, alike[name]) for name, value in rows.tensors().items()})
        both = _joined(rows, start)
        values = [value for value in both.tensors().values() if value.is_floating_point()]
        return both.mean(self._weights(distances(values), len(rows)))

    def covered_mean(self, table: AdapterTable, weights: Tensor, start: AdapterTable) -> AdapterTable:
        """The mean of adapters of which clients have some ranks and projections: entry by entry over those that have
        it, and what was before where nobody has. By the rules that count all alike, clients stand where they started
        with what they do not have. The arguments are those of `mean`, with one start."""
        if self.settings.robust == "none":
            return covered_mean(table, weights, start)
        return self.mean(filled(table, start), weights, start)

    def product_mean(self, table: AdapterTable, weights: Tensor, start: AdapterTable) -> AdapterTable:
        """The mean of products at the rank of the clients' adapters, as one row: columns of B orthonormal, A carries
        the singular values. Ranks that a client does not have are zeros, and by the rules that count all alike as they
        were. The arguments are those of `mean`."""
        means = self.products(table, weights, start, table.r)
        return AdapterTable([A for A, _ in means], [B for _, B in means])

    def products(
        self, table: AdapterTable, weights: Tensor, start: AdapterTable, rank: int | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """The same as one row of A and of B for every shape of projection, at another rank, or by default at the one
        that the mean has at most: the sum of the clients' ranks, or the shorter side."""
        robust = self.settings.robust
        if robust != "none":
            table, start = _with_images(filled(table, start), weights, start)
            weights = torch.ones(len(table))
        trimmed, rows = robust == "trimmed", table
        if robust not in ("none", "trimmed"):
            rows = _joined(table, start)
            weights = self._weights(product_distances(rows.factors), len(table))
        means = []
        for A, B in rows.factors:
            shorter = min(A.shape[-1], B.shape[-2])
            found = min(rank or (shorter if trimmed else int(rows.rank.sum())), shorter)
            if trimmed:
                means.append(trimmed_product_mean(A, B, self.settings.robust_trim, found))
            else:
                means.append(product_space_mean(A, B, weights, found))
        return [(A[None], B[None]) for A, B in means]

    def _weights(self, squared: Tensor, clients: int) -> Tensor:
        """Of the rows of n clients and those of their starts, by the squared distances between all of them: the mean
        of clipped changes from the starts, or the clients' geometric median."""
        starts = len(squared) - clients
        if self.settings.robust == "median":
            weights = geometric_median_weights(squared[:clients, :clients])
            return torch.cat([weights, weights.new_zeros(starts)])
        places = torch.arange(clients, device=squared.device)
        norms = squared[places, clients + places if starts > 1 else torch.full_like(places, clients)].sqrt()
        scales = clipping_scales(norms, self.settings.robust_bound)
        back = 1 - scales  # what of each client's start stays
        return torch.cat([scales, back if starts > 1 else back.sum()[None]]) / clients


def _trimmed(value: Tensor, trim: float, alike: Tensor) -> Tensor:
    return trimmed_mean(value, trim)[None] if value.is_floating_point() else alike


def _with_images(rows: S, weights: Tensor, start: Stack) -> tuple[S, S]:
    """The rows that count, and the tensors of their starts that they have."""
    worked = weights > 0
    starts = start.tensors()
    begun = rows.like({name: starts[name].to(value) for name, value in rows.tensors().items()})
    return rows.rows(worked), begun if len(begun) == 1 else begun.rows(worked)


def _joined(rows: S, more: S) -> S:
    """The rows of both."""
    others = more.tensors()
    return rows.like({name: torch.cat([value, others[name]]) for name, value in rows.tensors().items()})
