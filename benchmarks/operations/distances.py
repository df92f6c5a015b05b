"""Distances between the subspaces of N clients, against a loop over pairs and against einsum in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Lineup, WrongResult
from benchmarks.cost import Cost
from benchmarks.operations import Operation
from benchmarks.timing import DEVICE
from hilora.kernels import subspace_distances
from hilora.kernels.overlaps import reference

PAIRS = 1000  # that the loop does at most; its time is reckoned up to all there are
LEAST_GAP = {"ieee": 1e-5, "tf32": 1e-3}  # between two distances whose order must be kept


class Distances(NamedTuple):
    clients: int
    width: int = 192
    projections: int = 24
    rank: int = 8


def shapes(scale: str) -> list[Distances]:
    if scale == "toy":
        return [Distances(6, width=16, projections=2, rank=2)]
    if scale == "cpu":
        return [Distances(100), Distances(25), Distances(1000, projections=2)]
    return [Distances(clients, width=width) for clients in (1000, 100, 5000) for width in (768, 192)]


def cost(shape: Distances) -> Cost:
    """Each pair once, in fp32: `2·w·r²` FLOPs for each projection's `U_iᵀU_j`; bases read once."""
    N, P, w, r = shape.clients, shape.projections, shape.width, shape.rank
    return Cost(((N * (N - 1) / 2 * P * 2 * w * r * r, 4 * N * P * w * r + 4 * N * N),))


def lineup(shape: Distances, phase: str, scale: str) -> Lineup:
    U = _clients(shape)
    exact = reference.subspace_distances(U.double())
    i, j = torch.tril_indices(shape.clients, shape.clients, -1)
    every = max(1, len(i) // PAIRS)
    pairs = list(zip(i[::every].tolist(), j[::every].tolist(), strict=True))

    def loop() -> Tensor:
        found = U.new_empty(len(pairs))
        for index, (i, j) in enumerate(pairs):
            cosines = U[i].mT @ U[j]  # of all projections
            found[index] = 1 - cosines.square().sum() / (shape.rank * shape.projections)
        return found

    def einsum() -> Tensor:
        rows = max(1, 2**27 // (shape.clients * shape.projections * shape.rank**2))  # half a gigabyte of products
        blocks = [torch.einsum("ipnr,jpns->ijprs", block, U).square().sum((2, 3, 4)) for block in U.split(rows)]
        return 1 - torch.cat(blocks) / (shape.rank * shape.projections)

    def by_reference() -> Tensor:
        return reference.subspace_distances(U)

    def ours() -> Tensor:
        return subspace_distances(U)

    least = cost(shape)

    def contestant(step: Callable[[], Tensor], precision: str = "ieee") -> Contestant:
        def result() -> list[Tensor]:
            found = step()
            off = float((found - exact).abs().fill_diagonal_(0).max())
            if not 2 * off < LEAST_GAP[precision]:
                raise WrongResult(f"a distance is off by {off:.1e}: the order of distances is lost")
            return [found.fill_diagonal_(0)]

        return Contestant(step, result, least, 2e-2)

    rivals = {"hilora": contestant(ours), "hilora, reference": contestant(by_reference), "einsum": contestant(einsum)}
    rivals["loop over pairs"] = Contestant(loop, lambda: [loop()], least, 1e-4, len(pairs) / len(i))
    if DEVICE == "cuda":
        rivals |= {
            f"{name}, tf32": contestant(_by_tf32(step), "tf32") for name, step in (("hilora", ours), ("einsum", einsum))
        }
    return Lineup(rivals, {"": [exact], "loop over pairs": [exact[tuple(zip(*pairs, strict=True))]]})


def _clients(shape: Distances) -> Tensor:
    """Bases `[N, P, out, r]` of clients in five groups. Distances are about .02, as of adapters trained from one start:
    their order is all that a clustering has."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(count: int) -> Tensor:
        size = (count, shape.projections, shape.width, shape.rank)
        return torch.randn(size, generator=generator, device=DEVICE).div_(shape.width**0.5)

    group = torch.arange(shape.clients, device=DEVICE) % 5
    B = random(1) + 0.05 * random(5)[group] + 0.1 * random(shape.clients)
    root = torch.linalg.cholesky(B.mT @ B)  # B is far from singular; an SVD of each would take minutes
    U: Tensor = torch.linalg.solve_triangular(root, B.mT, upper=False).mT.contiguous()
    return U


def _by_tf32(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def by_tf32() -> Tensor:
        matmul = torch.backends.cuda.matmul
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
        try:
            return step()
        finally:
            matmul.fp32_precision = before

    return by_tf32


OPERATION = Operation("Distances of clients", Distances, shapes, lineup, {"forward": ""}, place=6, first=1)
