"""Adapted q and v of an attention layer: ours, the frozen layers alone, and PEFT with three adapters.

The frozen layers are the limit: adapters that cost nothing would be `PEFT / frozen` times faster than PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benchmarks.rivals import Projections, forced, reset, with_hilora, with_peft
from benchmarks.timing import DEVICE, Step, compare

TOKENS = 197
IMAGES = 64 if DEVICE == "cuda" else 16
DTYPES = [torch.bfloat16, torch.float32] if DEVICE == "cuda" else [torch.float32]
BACKENDS = ["reference", "fused", "split"] if DEVICE == "cuda" else ["reference"]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=[192, 384, 768])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def rivals(width: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    frozen = Projections(width).to(DEVICE, dtype).requires_grad_(False)
    ours = with_hilora(copy.deepcopy(frozen), width)
    peft = with_peft(copy.deepcopy(frozen), ours)
    return {"frozen layers": frozen, "PEFT": peft, "hilora": ours}


@pytest.fixture
def x(width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(IMAGES, TOKENS, width, device=DEVICE, dtype=dtype, requires_grad=True)


def training_step(model: nn.Module, x: Tensor, upstream: Tensor) -> Callable[[], Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> Tensor:
        reset([x, *trained])
        torch.autograd.backward(model(x), (upstream, upstream, upstream))
        assert x.grad is not None
        return x.grad

    return step


def with_backends(ours: Step) -> dict[str, Step]:
    def by(backend: str) -> Step:
        def step() -> object:
            with forced(backend):
                return ours()

        return step

    return {f"hilora, {backend}": by(backend) for backend in BACKENDS}


def check_alike(one: Tensor, other: Tensor, dtype: torch.dtype) -> None:
    """No figure without the right result."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    assert (one - other).norm() <= tolerance * other.norm()


@torch.no_grad()
def test_forward(benchmark, rivals: dict[str, nn.Module], x: Tensor, dtype: torch.dtype) -> None:
    for mine, theirs in zip(rivals["hilora"](x), rivals["PEFT"](x), strict=True):
        check_alike(mine, theirs, dtype)
    steps: dict[str, Step] = {name: lambda model=model: model(x) for name, model in rivals.items()}  # type: ignore[misc]
    compare(benchmark, steps | with_backends(steps["hilora"]), "hilora")


def test_training_step(benchmark, rivals: dict[str, nn.Module], x: Tensor, dtype: torch.dtype) -> None:
    upstream = torch.randn_like(x)
    gradients = {name: training_step(model, x, upstream) for name, model in rivals.items()}
    check_alike(gradients["hilora"](), gradients["PEFT"](), dtype)
    steps: dict[str, Step] = {**gradients, **with_backends(gradients["hilora"])}
    seconds = compare(benchmark, steps, "hilora")
    benchmark.extra_info["limit: PEFT / frozen layers"] = round(seconds["PEFT"] / seconds["frozen layers"], 2)
    benchmark.extra_info["share of the limit"] = round(seconds["frozen layers"] / seconds["hilora"], 2)
