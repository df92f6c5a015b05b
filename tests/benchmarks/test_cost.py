"""The model of cost, against sums by hand."""

from __future__ import annotations

import torch

from benchmarks import cost
from benchmarks.cost import Cost, Rates
from benchmarks.federation import Round, local_epoch
from benchmarks.operations import distances, layer, penalty
from benchmarks.operations.distances import Distances
from benchmarks.operations.layer import Layer
from benchmarks.operations.penalty import Penalty


def test_floor_is_the_longer_of_arithmetic_and_bytes_of_each_pass() -> None:
    assert Cost(((100, 5), (20, 80))).floor(Rates(flops=10, bandwidth=1)) == 10 + 80


def test_forward_of_the_frozen_layer() -> None:
    shape = Layer(width=4, rows=10)
    # y = x W': 10 x 4 x 12 multiply-adds; x, y, W in four bytes each
    assert layer.cost(shape, "forward", adapted=False).passes == ((960, 4 * (40 + 120 + 48)),)


def test_three_layers_read_x_three_times() -> None:
    one, three = (layer.cost(Layer(4, 10, form), "forward", adapted=False) for form in ("qkv", "q, k, v"))
    assert three.passes[0][1] - one.passes[0][1] == 2 * 4 * 40


def test_forward_with_adapters() -> None:
    shape = Layer(width=4, rows=10, rank=1, tiers=1, dtype="bfloat16")
    # q and v: fold 4 x 1 x 4 twice (64 FLOPs) is less than x A', S B' twice (2 x 160); A and B of both: 16 elements
    assert layer.cost(shape, "forward", adapted=True).passes == ((960 + 64, 2 * (40 + 120 + 48 + 16)),)
    groups = shape._replace(groups=5)
    # five clients: folding five times is 320 as well; six would make the thin products the lesser work
    assert layer.cost(groups, "forward", adapted=True).passes[0][0] == 960 + 320
    assert layer.cost(groups._replace(groups=6), "forward", adapted=True).passes[0][0] == 960 + 320


def test_step_with_adapters() -> None:
    shape = Layer(width=4, rows=10, groups=6, rank=1, tiers=1)
    forward, backward = layer.cost(shape, "step", adapted=True).passes
    assert forward == layer.cost(shape, "forward", adapted=True).passes[0]
    assert backward[0] == 960 + 2 * 160 + 2 * 160  # dx; dY B and dS A; dA and dB
    assert backward[1] == forward[1] + 4 * (40 + 6 * 16)  # x once more; dA and dB


def test_penalty_and_distances() -> None:
    assert penalty.cost(Penalty(width=8, depth=1, rank=2)).passes == ((8 * 2 * 8 * 4, 4 * 4 * 2 * 8 * 2),)
    found = distances.cost(Distances(3, width=8, projections=2, rank=2)).passes
    assert found == ((3 * 2 * 2 * 8 * 4, 4 * (3 * 2 * 8 * 2 + 9)),)


def test_local_epoch() -> None:
    shape = Round("a ViT", 32, clients=3, images=5)
    block = (
        2 * 7 * (4 * 16 + 8 * 16) + 2 * 2 * 7 * 7 * 4
    )  # qkv and proj, two layers of the MLP; scores and their values
    found = local_epoch(shape, tokens=7, width=4, depth=2)
    assert found.passes == ((3 * 5 * 2 * 2 * block, 0),)


def test_rates_are_measured() -> None:
    rates = cost.measured_rates(torch.float32, "toy")
    assert rates.flops > 0
    assert rates.bandwidth > 0
