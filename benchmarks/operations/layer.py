"""Adapted q and v of an attention layer: forward, and forward with backward, against the rivals of `rivals.py`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contest import Contestant, Lineup
from benchmarks.cost import Cost
from benchmarks.operations import Charts, Operation
from benchmarks.timing import DEVICE, Inputs, rotation
from hilora.kernels import Tier, use_backend
from hilora.kernels.cost import layer
from hilora.kernels.stacked_linear import reference
from hilora.reporting.style import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

if TYPE_CHECKING:
    from benchmarks.rivals import Problem, Rival

TOKENS = 197  # of a ViT/16 at 224 px, with its class token
WIDTHS = {"ViT-Ti": 192, "ViT-S": 384, "ViT-B": 768, "ViT-L": 1024}
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


class Layer(NamedTuple):
    """The q, k and v of an attention layer with adapters on q and v."""

    width: int
    rows: int  # of all groups together
    form: str = "qkv"  # one layer, as in timm; or "q, k, v", three layers, as in transformers
    groups: int = 1  # clients, each with adapters of its own
    rank: int = 8
    tiers: int = 3
    dtype: str = "float32"
    compiled: bool = False  # whether to compare with compiled PEFT, which takes seconds for each shape

    @property
    def torch_dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.dtype)
        return found


def shapes(scale: str) -> list[Layer]:
    if scale == "toy":
        return [Layer(32, 24, compiled=True), Layer(32, 24, "q, k, v"), Layer(32, 24, groups=2, tiers=2)]
    if scale == "cpu":
        centre = Layer(192, 16 * TOKENS, compiled=True)
        narrow = centre._replace(dtype="bfloat16", compiled=False)
        return _distinct(
            [centre._replace(width=width) for width in (192, 384, 768)]
            + [centre._replace(form="q, k, v", width=width) for width in (192, 384, 768)]
            + [centre._replace(groups=groups, compiled=False) for groups in (4, 16)]
            + [centre._replace(tiers=tiers) for tiers in (1, 2)]
            + [centre._replace(rows=images * TOKENS) for images in (1, 4, 64)]
            + [centre._replace(rank=rank) for rank in (4, 16, 32)]
            + [centre._replace(rows=4 * TOKENS, width=width) for width in (384, 768, 1024)]
            + [centre._replace(rows=4 * TOKENS, width=768, groups=4, compiled=False)]
            + [narrow, narrow._replace(groups=16), narrow._replace(rows=TOKENS)]
            + [narrow._replace(rows=4 * TOKENS, width=width) for width in (192, 768)]
        )
    centre = Layer(768, 64 * TOKENS, dtype="bfloat16", compiled=True)
    plain = centre._replace(compiled=False)
    rows = [64 * TOKENS, 1024, 256 * TOKENS]
    return _distinct(
        [centre, plain._replace(groups=16), plain._replace(groups=4)]
        + [centre._replace(width=width) for width in WIDTHS.values()]
        + [centre._replace(rows=count) for count in rows]
        + [centre._replace(form="q, k, v"), plain._replace(dtype="float32")]
        + [plain._replace(tiers=tiers) for tiers in (1, 2)]
        + [plain._replace(rank=rank) for rank in (4, 16, 32)]
        + [
            plain._replace(width=width, rows=count, groups=groups)
            for groups, count, width in product((1, 4, 16), rows, WIDTHS.values())
        ]
    )


def _distinct(shapes: list[Layer]) -> list[Layer]:
    """Each shape once, however its rivals differ."""
    found: dict[Layer, Layer] = {}
    for shape in shapes:
        found.setdefault(shape._replace(compiled=False), shape)
    return list(found.values())


def cost(shape: Layer, phase: str, adapted: bool) -> Cost:
    """A forward pass, or with one backward pass that needs dx and, of the adapters, the gradients of the last tier."""
    ranks = [shape.rank] * shape.tiers if adapted else []
    readers = 1 if shape.form == "qkv" else 3
    size = shape.torch_dtype.itemsize
    forward, backward = layer(shape.rows, shape.width, ranks, shape.groups, size, readers=readers)
    return forward if phase == "forward" else Cost(forward.passes + backward.passes)


def lineup(shape: Layer, phase: str, scale: str) -> Lineup:
    from benchmarks.rivals import Problem

    problem = Problem.of(shape)
    per_set = 2 * 4 * shape.rows * shape.width * shape.torch_dtype.itemsize
    inputs = [_inputs(shape, seed) for seed in range(rotation(per_set))]
    return Lineup(
        {name: _contestant(problem, rival, phase, backend) for name, (rival, backend) in _rivals(problem).items()},
        {"": _truth(problem, phase, inputs[0]), "frozen layer": _truth(problem, phase, inputs[0], adapted=False)},
        inputs,
        shape.torch_dtype,
        lacking={} if find_spec("peft") else {"PEFT": "peft"},
    )


def _rivals(problem: Problem) -> dict[str, tuple[Rival, str | None]]:
    """By name: the rival, and the implementation that is made to serve it."""
    from benchmarks import rivals

    shape, mine = problem.shape, rivals.ours(problem)
    found: dict[str, tuple[Rival, str | None]] = {"hilora": (mine, None)}
    for backend in ("fused", "split", "reference") if DEVICE == "cuda" else ("reference",):
        found[f"hilora, {backend}"] = mine, backend
    if shape.form == "qkv":
        found["hilora, whole qkv"] = rivals.ours(problem, whole=True), None
    if find_spec("peft"):
        found["PEFT"] = rivals.peft(problem), None
    if find_spec("peft") and shape.compiled:
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
        cost(shape, phase, adapted),
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
    from benchmarks.rivals import SCALE

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


def columns(shape: Layer) -> dict[str, object]:
    return {
        "form": shape.form,
        "width": shape.width,
        "rows": f"{shape.rows:,}",
        "clients": shape.groups,
        "tiers × rank": f"{shape.tiers} × {shape.rank}",
        "dtype": shape.dtype,
    }


def describe(shape: Layer) -> str:
    clients = f", {shape.groups} clients" if shape.groups > 1 else ""
    tiers = f"{shape.tiers} tiers" if shape.tiers > 1 else "1 tier"
    return (
        f"width {shape.width}, {shape.rows:,} rows{clients}, {tiers} of rank {shape.rank}, {shape.dtype}, {shape.form}"
    )


OPERATION = Operation(
    "Adapters on q and v",
    Layer,
    shapes,
    lineup,
    {"forward": "forward", "step": "forward and backward"},
    columns,
    Charts(
        colours={
            "hilora": BLUE,
            "hilora, whole qkv": SKY,
            "PEFT": VERMILION,
            "PEFT, compiled": ORANGE,
            "stacked addmm": GREEN,
            "merged + 1 LoRA": PURPLE,
            "frozen layer": GREY,
        },
        limit="frozen layer",
        curves={
            "rows": "rows (images × tokens)",
            "rank": "rank of each tier",
            "tiers": "tiers",
            "groups": "clients in a batch",
        },
        aside={"compiled": False},
        describe=describe,
    ),
    place=1,
    first=2,
)
