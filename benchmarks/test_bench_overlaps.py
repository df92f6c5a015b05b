"""The orthogonality penalty of 24 projections against a loop over PEFT's modules, and distances of clients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import hilora
from benchmarks.rivals import GAMMA, Blocks, forced, peft_penalty, reset, with_hilora, with_peft
from benchmarks.timing import DEVICE, Step, compare
from hilora.kernels import orthonormal_basis, reference, subspace_distances

DEPTH = 12


@pytest.mark.parametrize("width", [192, 384, 768])
def test_penalty_and_gradient(benchmark, width: int) -> None:
    torch.manual_seed(0)
    base = Blocks(width, DEPTH).to(DEVICE)
    ours = with_hilora(copy.deepcopy(base), width)
    peft = with_peft(base, ours)
    trained = {model: [p for p in model.parameters() if p.requires_grad] for model in (ours, peft)}

    def loop() -> Tensor:
        reset(trained[peft])
        penalty = peft_penalty(peft)
        penalty.backward()
        return penalty

    def batched() -> Tensor:
        reset(trained[ours])
        penalty = hilora.orthogonality_penalty(ours, gamma_root=GAMMA, gamma_cluster=GAMMA)
        penalty.backward()
        return penalty

    def by_reference() -> Tensor:
        with forced("reference"):
            return batched()

    torch.testing.assert_close(batched(), loop())
    steps: dict[str, Step] = {"loop over modules": loop, "hilora, reference": by_reference, "hilora": batched}
    compare(benchmark, steps, "hilora", repeats=15, inner=20)


@pytest.mark.parametrize("clients", [25, 100, 1000] if DEVICE == "cuda" else [25, 100])
def test_distances(benchmark, clients: int) -> None:
    torch.manual_seed(0)
    U = orthonormal_basis(torch.randn(clients, 2 * DEPTH, 192, 8, device=DEVICE))

    def loop() -> Tensor:
        distances = U.new_zeros(clients, clients)
        for i in range(clients):
            for j in range(i):
                cosines = U[i].mT @ U[j]
                distances[i, j] = distances[j, i] = 1 - cosines.square().sum() / (8 * 2 * DEPTH)
        return distances

    def einsum() -> Tensor:
        cosines = torch.einsum("ipnr,jpns->ijprs", U, U)
        return 1 - cosines.square().sum((2, 3, 4)) / (8 * 2 * DEPTH)

    torch.testing.assert_close(
        subspace_distances(U), reference.subspace_distances(U.double()).float(), rtol=0, atol=1e-5
    )
    steps: dict[str, Step] = {"einsum": einsum, "hilora, reference": lambda: reference.subspace_distances(U)}
    if clients <= 100:
        steps["loop over pairs"] = loop
    compare(benchmark, steps | {"hilora": lambda: subspace_distances(U)}, "hilora", repeats=5)
