"""Whether PyTorch's insides are still what the package takes them for."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from hilora.adapters import torch_internals as internals
from tests.helpers import vit


def test_a_graph_of_the_former_shape_does_not_spoil_gradients_of_the_new_one() -> None:
    for dtype in (torch.float32, torch.half, torch.float64):
        parameter = nn.Parameter(torch.ones(2, 3, dtype=dtype))
        old = (parameter * 2).sum()
        parameter.grad = torch.ones_like(parameter)
        internals.reshape_parameter(parameter, torch.ones(4, 3, dtype=dtype))
        assert parameter.grad is None
        parameter.square().sum().backward()
        assert torch.equal(parameter.grad, 2 * parameter.detach())
        del old


def test_versions_count_writes() -> None:
    x = torch.zeros(3)
    before = internals.version(x)
    x[1].add_(1)
    assert internals.version(x) > before
    before = internals.version(x)
    x.sum()
    assert internals.version(x) == before


def test_transforms_are_seen() -> None:
    seen = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(internals.in_transform())
        return x.sum()

    function(torch.zeros(2))
    torch.func.grad(function)(torch.zeros(2))
    torch.func.vmap(function)(torch.zeros(2, 2))
    assert seen == [False, True, True]


def test_the_walk_is_that_of_named_modules() -> None:
    model = vit()
    model.again = model.blocks[0].mlp.fc1
    want = [(p, m) for p, m in model.named_modules(remove_duplicate=False) if isinstance(m, nn.Linear)]
    assert list(internals.walk(model, nn.Linear)) == want
    assert list(internals.walk(model, type(model))) == [("", model)]


def test_hooks_are_found_and_taken_over() -> None:
    calls = []
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    one.register_forward_pre_hook(lambda *args: calls.append("before"))
    handle = one.register_forward_hook(lambda *args: calls.append("after"))
    one.register_full_backward_hook(lambda *args: calls.append("backward"))
    assert len(internals.hooks(one)) == 2
    internals.take_over_hooks(other, one)
    other(torch.zeros(1, 2, requires_grad=True)).sum().backward()
    assert calls == ["before", "after", "backward"]
    handle.remove()
    assert len(internals.hooks(other)) == 1


def test_a_weight_that_is_computed_is_told() -> None:
    linear = nn.Linear(2, 2)
    assert internals.owns_weight(linear)
    assert internals.owns_weight(copy.deepcopy(linear))
    assert not internals.owns_weight(weight_norm(linear))
