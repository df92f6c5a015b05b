"""Adapted q and v of an attention layer: forward, and forward with backward, against the rivals of `rivals.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cost, rivals
from benchmarks.contest import Contestant, contest
from benchmarks.ledger import Ledger
from benchmarks.rivals import SCALE, Problem, Rival
from benchmarks.shapes import Layer
from benchmarks.timing import DEVICE, Inputs, rotation
from hilora.kernels import Tier, use_backend
from hilora.kernels.stacked_linear import reference

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@pytest.mark.parametrize("phase", ["forward", "step"])
def test_layer(benchmark: Any, ledger: Ledger, shape: Layer, phase: str) -> None:
    problem = Problem.of(shape)
    per_set = 2 * 4 * shape.rows * shape.width * shape.torch_dtype.itemsize
    inputs = [_inputs(shape, seed) for seed in range(rotation(per_set))]
    contest(
        benchmark,
        ledger,
        {"op": "layer", "phase": phase, **shape._asdict()},
        {name: _contestant(problem, rival, phase, backend) for name, (rival, backend) in _rivals(problem).items()},
        inputs,
        {"": _truth(problem, phase, inputs[0]), "frozen layer": _truth(problem, phase, inputs[0], adapted=False)},
        shape.torch_dtype,
    )


def _rivals(problem: Problem) -> dict[str, tuple[Rival, str | None]]:
    """By name: the rival, and the implementation that is made to serve it."""
    shape, mine = problem.shape, rivals.ours(problem)
    found: dict[str, tuple[Rival, str | None]] = {"hilora": (mine, None)}
    for backend in ("fused", "split", "reference") if DEVICE == "cuda" else ("reference",):
        found[f"hilora, {backend}"] = mine, backend
    if shape.form == "qkv":
        found["hilora, whole qkv"] = rivals.ours(problem, whole=True), None
    found["PEFT"] = rivals.peft(problem), None
    if shape.compiled:
        found["PEFT, compiled"] = rivals.compiled(rivals.peft(problem)), None
    found["stacked addmm"] = rivals.stacked(problem), None
    found["merged + 1 LoRA"] = rivals.merged(problem), None
    found["frozen layer"] = rivals.frozen(problem), None
    return found


def _inputs(shape: Layer, seed: int) -> Inputs:
    """x `[G, M, in]`, and what comes back to the outputs, `[G, M, 3 out]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape.rows // shape.groups
    x = torch.randn(shape.groups, rows, shape.width, generator=generator)
    upstream = torch.randn(shape.groups, rows, 3 * shape.width, generator=generator)
    return x.to(DEVICE, shape.torch_dtype), upstream.to(DEVICE, shape.torch_dtype)


def _contestant(problem: Problem, rival: Rival, phase: str, backend: str | None) -> Contestant:
    shape = problem.shape
    ready: dict[int, list[tuple[Tensor, tuple[Tensor, ...]]]] = {}

    def prepared(x: Tensor, upstream: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """For each module its rows, and what comes back to each of its outputs; made once."""
        if id(x) not in ready:
            parts = (1 if shape.form == "qkv" else 3) if phase == "step" else 0
            ready[id(x)] = [
                (rows.detach().requires_grad_(phase == "step"), tuple(g.contiguous() for g in back.chunk(parts, -1)))
                if parts
                else (rows, ())
                for rows, back in zip(x.chunk(len(rival.modules)), upstream.chunk(len(rival.modules)), strict=True)
            ]
        return ready[id(x)]

    @torch.no_grad()
    def forward(x: Tensor, upstream: Tensor) -> list[tuple[Tensor, ...]]:
        return [module(rows) for module, (rows, _) in zip(rival.modules, prepared(x, upstream), strict=True)]

    trained = rival.trained()

    def step(x: Tensor, upstream: Tensor) -> None:
        for parameter in trained:
            parameter.grad = None
        for module, (rows, back) in zip(rival.modules, prepared(x, upstream), strict=True):
            rows.grad = None
            torch.autograd.backward(module(rows), back)

    def result(x: Tensor, upstream: Tensor) -> list[Tensor]:
        if phase == "forward":
            return [torch.cat([torch.cat(outputs, -1) for outputs in forward(x, upstream)])]
        step(x, upstream)
        dx = [rows.grad for rows, _ in prepared(x, upstream)]
        return [torch.cat(dx), *(rival.gradients() if trained else [])]  # type: ignore[arg-type]

    chosen: Callable[..., object] = forward if phase == "forward" else step
    adapted = bool(rival.live)
    return Contestant(
        _served_by(backend, chosen),
        _served_by(backend, result),
        cost.layer(shape, phase, adapted),
        TOLERANCE[shape.torch_dtype],
    )


def _served_by(backend: str | None, function: Callable[..., Any]) -> Callable[..., Any]:
    if backend is None:
        return function

    def served(*inputs: Tensor) -> Any:
        with use_backend(backend):
            return function(*inputs)

    return served


def _truth(problem: Problem, phase: str, one: Inputs, adapted: bool = True) -> list[Tensor]:
    """In fp64, from the specification: outputs, or gradients of x and of A and B of the last tier."""
    x, upstream = one
    width = problem.shape.width
    layers = list(problem.base.children())
    weight, bias = (torch.cat([getattr(layer, name).double() for layer in layers]) for name in ("weight", "bias"))
    rows = x.double().requires_grad_()
    A, B = ([factor.double() for factor in factors] for factors in (problem.A, problem.B))
    live = [factors[-1].requires_grad_() for factors in (A, B)] if adapted else []
    tiers = [
        Tier(tier_A, tier_B[:, part].contiguous(), SCALE, slot, columns)
        for part, columns in enumerate([(0, width), (2 * width, width)])
        for tier_A, tier_B, slot in zip(A, B, problem.slots, strict=True)
    ]
    y = reference.stacked_lora_linear(rows, weight, bias, tiers if adapted else [])
    if phase == "forward":
        return [y.detach()]
    return list(torch.autograd.grad(y, [rows, *live], upstream.double()))
