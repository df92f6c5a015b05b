"""The kernels as operators of torch: traced, recomputed, cast, captured."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hilora
from hilora.kernels import use_backend
from tests.helpers import images, injected
from tests.kernels.cases import CASES, DEVICE, Adapters, Case, make, moved, random

pytest.importorskip("triton")
from hilora.kernels.overlaps import operator as overlaps
from hilora.kernels.stacked_linear import operator as stacked_linear

pytestmark = pytest.mark.slow


@pytest.fixture(params=["reference", "folded", "fused", "split"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    torch._dynamo.reset()
    with use_backend(request.param):
        yield request.param
    torch._dynamo.reset()


@pytest.fixture
def model() -> nn.Module:
    """A small ViT, its cluster tier in training for two clients."""
    model: nn.Module = injected().to(DEVICE)
    hilora.set_slots(model, cluster=torch.tensor([0, 1]), root=torch.tensor([0, -1]))
    hilora.set_active_tier(model, "cluster")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(random(*parameter.shape, seed=5).to(parameter), alpha=0.02)
    return model


def step(model: nn.Module, call: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Output and all gradients of a training step."""
    model.zero_grad()
    y = call(images(4).to(DEVICE))
    (y.square().sum() + hilora.orthogonality_penalty(model)).backward()
    return [y.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(got) == len(want) > 3
    for mine, theirs in zip(got, want, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm()


def arguments(case: Case, plan: str) -> tuple[object, ...]:
    x, weight, bias, tiers = moved(*make(case, torch.float32))
    A, B, scales, slots, _, _, ranks, own = zip(*tiers, strict=True)
    starts = [tier.columns[0] if tier.columns else 0 for tier in tiers]
    each = (list(values) for values in (A, B, slots, ranks, own, scales))
    return x, weight, bias, *each, starts, [True] * len(tiers), plan


@pytest.mark.parametrize("plan", ["fused", "split"])
@pytest.mark.parametrize(
    "name", ["a shared tier, one by cluster, one by client", "slots that repeat or are none", "a scale for each slot"]
)
def test_the_linear_operator_keeps_torchs_rules(name: str, plan: str) -> None:
    torch.library.opcheck(stacked_linear.stacked_lora_linear, arguments(CASES[name], plan))


def test_the_overlap_operators_keep_torchs_rules() -> None:
    active, frozen = (
        random(2, 3, 9, 2).float().to(DEVICE).requires_grad_(),
        random(2, 1, 9, 3, seed=1).float().to(DEVICE),
    )
    torch.library.opcheck(overlaps.gram_penalty, (active, [frozen, frozen], [0.5, 1.0]))
    torch.library.opcheck(overlaps.subspace_distances, (random(5, 2, 9, 2).float().to(DEVICE),))


def test_all_implementations_train_a_vit_alike(backend: str, model: nn.Module) -> None:
    got = step(model, model)
    with use_backend("reference"):
        assert_same(got, step(model, model))


def test_a_compiled_vit_has_no_graph_break(backend: str, model: nn.Module) -> None:
    want = step(model, model)
    assert_same(step(model, torch.compile(model, fullgraph=True, backend="aot_eager")), want)
    penalty = torch.compile(lambda: hilora.orthogonality_penalty(model), fullgraph=True, backend="aot_eager")
    assert penalty().item() == pytest.approx(hilora.orthogonality_penalty(model).item())


def test_activation_checkpoints(backend: str, model: nn.Module) -> None:
    want = step(model, model)
    assert_same(step(model, lambda x: checkpoint(model, x, use_reentrant=False)), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, model: nn.Module, dtype: torch.dtype) -> None:
    seen = []
    qkv = model.get_submodule("blocks.0.attn.qkv")
    qkv.register_forward_hook(lambda module, args, y: seen.append(y.dtype))
    want = step(model, model)
    with torch.autocast(DEVICE, dtype):
        got = step(model, model)
    assert seen == [torch.float32, dtype]
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters() if parameter.grad is not None)
    assert_same([value.float() for value in got], want, tolerance=0.05)


def test_torch_func_differentiates_and_maps(backend: str) -> None:
    if DEVICE == "cuda" and backend == "folded":
        pytest.skip("not where CUDA tensors go")
    x, weight, _, tiers = make(Case((3, 7), 5, [Adapters(2)]), torch.float32)
    x, weight, A, B = (t.detach().to(DEVICE) for t in (x, weight, tiers[0].A, tiers[0].B))

    def loss(A: Tensor) -> Tensor:
        return hilora.kernels.stacked_lora_linear(x, weight, None, [hilora.kernels.Tier(A, B, 2.0)]).square().sum()

    leaf = A.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(loss)(A), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.func.vmap(loss)(torch.stack([A, A])), loss(A).expand(2), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["fused", "split"], indirect=True)
def test_a_step_captured_in_a_cuda_graph(backend: str, model: nn.Module) -> None:
    want = step(model, model)
    x = images(4).to(DEVICE)

    def train() -> None:
        (model(x).square().sum() + hilora.orthogonality_penalty(model)).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad()
            train()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        train()
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad.zero_()
    graph.replay()
    assert_same([p.grad for p in model.parameters() if p.grad is not None], want[1:])


def test_a_graph_of_gradients_can_be_differentiated() -> None:
    x, weight, bias, tiers = moved(*make(CASES["slots that repeat or are none"], torch.float32))
    active, frozen = (random(2, 3, 9, 2, seed=seed).float().to(DEVICE) for seed in (0, 1))
    leaves = [x, tiers[0].A, tiers[1].B, active.requires_grad_()]
    found = []
    for backend in ("split", "reference"):
        with use_backend(backend):
            y = hilora.kernels.stacked_lora_linear(x, weight, bias, tiers).sin().sum()
            y = y + hilora.kernels.gram_penalty(active, [frozen], [0.5])
        first = torch.autograd.grad(y, leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(torch.stack([one.square().sum() for one in first]).sum(), leaves)])
    assert_same(found[0], found[1])
