"""What is checked of a model in the sweep. Each check gets a model of its own."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import hilora
from hilora import HiLoRAConfig, TieredLoRALinear
from hilora.adapters.injection import head_parameters
from tests.helpers import TIERS, randomise, same
from tests.sweep.models import Model


class NotOurs(Exception):
    """What the plain model cannot do, either."""


BACKEND = "aot_eager"  # of torch.compile


def outputs(model: nn.Module, case: Model, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """All floating-point tensors that a model gives for two images."""
    args, named = case.inputs(dtype=dtype)
    torch.manual_seed(0)
    return _tensors(model(*args, **named))


def _tensors(output: Any) -> list[Tensor]:
    found = dict(output) if isinstance(output, Mapping) else output
    return [leaf for leaf in tree_leaves(found) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _seen(model: nn.Module, case: Model, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    with torch.no_grad():
        return [value.clone() for value in outputs(model, case, dtype)]


def _frozen(case: Model) -> nn.Module:
    """The plain model, of which that alone requires gradients which does in an adapted one: PyTorch rounds differently
    where weights do not."""
    model, heads = case.built(), set(head_parameters(_injected(case, lively=False)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in heads)
    return model


def _injected(case: Model, lively: bool = True) -> nn.Module:
    model = case.built()
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=case.targets))
    if lively:
        randomise(model, scale=0.1)
    return model


def _close(got: list[Tensor], want: list[Tensor], tolerance: float = 1e-3) -> bool:
    """Whether tensors agree, as far as the largest of their elements allows one to say so."""
    return len(got) == len(want) and all(
        float((a.double() - b.double()).abs().max()) <= tolerance * float(b.double().abs().max() + 1e-6)
        for a, b in zip(got, want, strict=True)
        if a.numel()
    )


def _loss(tensors: list[Tensor]) -> Tensor:
    return torch.stack([value.float().square().mean() for value in tensors if value.requires_grad]).sum()


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _layers(model: nn.Module) -> dict[str, TieredLoRALinear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TieredLoRALinear)}


def inject(case: Model) -> None:
    """Injection changes no bit."""
    plain = _frozen(case)
    keys, before = set(plain.state_dict()), _seen(plain, case)
    assert before, "the model gives nothing"
    again = _seen(_frozen(case), case)
    assert same(again, before), "the model itself is not reproducible"
    hilora.inject(plain, HiLoRAConfig(r=2, target_modules=case.targets))
    assert same(_seen(plain, case), before), "injection changes bits"
    assert {key for key in plain.state_dict() if ".lora_" not in key} == keys, "keys of the state dict have changed"


def acts(case: Model) -> None:
    """Each projection's adapters change the output."""
    model = _injected(case, lively=False)
    before = _seen(model, case)
    randomise(model, scale=0.1)
    after = _seen(model, case)
    assert not _close(after, before, 1e-5), "adapters do not act"
    with hilora.disable_adapters(model):
        assert same(_seen(model, case), before), "adapters that are disabled act"
    _loss(outputs(model, case)).backward()
    for path, layer in _layers(model).items():
        for name in ("lora_A", "lora_B"):
            grad = getattr(layer, name)["root"].grad
            assert grad is not None, f"adapters of {path} do not act"
            of_each = grad.view(len(layer.columns), -1).abs().amax(1).tolist()
            dead = [part for part, size in zip(layer.parts or (), of_each, strict=True) if not size]
            assert not dead, f"adapters of {path} ({', '.join(dead)}) do not act"


def gradients(case: Model) -> None:
    """Gradients reach the tier in training and the head, and nothing else."""
    model = _injected(case)
    heads = set(head_parameters(model))
    for tier in TIERS:
        hilora.set_active_tier(model, tier)
        model.zero_grad()
        _loss(outputs(model, case)).backward()
        reached = {name for name, grad in _gradients(model).items() if grad.any()}
        adapters = {name for name, _ in model.named_parameters() if name.endswith((f"lora_A.{tier}", f"lora_B.{tier}"))}
        assert adapters <= reached, f"no gradient for {sorted(adapters - reached)[:2]}"
        assert reached - adapters <= heads, f"a gradient for {sorted(reached - adapters - heads)[:2]}"


def merge(case: Model) -> None:
    """Merged outputs are the adapted ones; unmerged and unloaded ones are so to the bit."""
    plain, model = _frozen(case), _injected(case)
    before, adapted = _seen(plain, case), _seen(model, case)
    hilora.merge(model)
    assert _close(_seen(model, case), adapted), "merged outputs are others"
    assert model.state_dict().keys() == plain.state_dict().keys(), "a merged model has other keys"
    hilora.unmerge(model)
    assert same(_seen(model, case), adapted), "unmerged outputs are others"
    hilora.unload(model)
    assert same(_seen(model, case), before), "unloaded outputs are others"
    assert {path: type(m) for path, m in model.named_modules()} == {p: type(m) for p, m in plain.named_modules()}


def save(case: Model) -> None:
    """A file of adapters, and a state dict, give a fresh model the same outputs."""
    model = _injected(case)
    want = _seen(model, case)
    with tempfile.TemporaryDirectory() as folder:
        hilora.save_adapters(model, Path(folder) / "a.safetensors")
        other = hilora.load_adapters(case.built(), Path(folder) / "a.safetensors")
    assert same(_seen(other, case), want), "loaded adapters give other outputs"
    randomise(other, seed=1)
    other.load_state_dict(model.state_dict(), strict=True)
    assert same(_seen(other, case), want), "a loaded state dict gives other outputs"
    case.built().load_state_dict(hilora.unload(model).state_dict(), strict=True)


def compile(case: Model) -> None:
    """One graph, forward and backward, with the outputs and gradients of the model as it is."""
    model = _injected(case)
    want = outputs(model, case)
    _loss(want).backward()
    expected = _gradients(model)
    model.zero_grad()
    args, named = case.inputs()
    try:
        got = _compiled(model)(*args, **named)
    except Exception as error:
        _if_ours(error, lambda: _compiled(case.built().requires_grad_())(*args, **named))
    assert _close([t.detach() for t in got], [t.detach() for t in want]), "compiled outputs are others"
    _loss(got).backward()
    found = _gradients(model)
    assert found.keys() == expected.keys(), "other gradients"
    assert _close(list(found.values()), list(expected.values())), "compiled gradients are others"


def _compiled(model: nn.Module) -> Callable[..., list[Tensor]]:
    torch._dynamo.reset()
    run: Any = torch.compile(model, backend=BACKEND, fullgraph=True)

    def call(*args: Any, **named: Any) -> list[Tensor]:
        torch.manual_seed(0)
        return _tensors(run(*args, **named))

    return call


def copies(case: Model) -> None:
    """A deepcopy, and what a pickle brings back, are models of their own with the same outputs."""
    model = _injected(case)
    want = _seen(model, case)
    others = [copy.deepcopy(model)]
    try:
        others.append(pickle.loads(pickle.dumps(model)))
    except Exception as error:
        plain = case.built()
        _seen(plain, case)  # which may leave hooks behind
        _if_ours(error, lambda: pickle.dumps(plain))
    for other in others:
        assert same(_seen(other, case), want), "a copy gives other outputs"
        randomise(other, seed=1)
        assert not same(_seen(other, case), want), "a copy's adapters do not act"
    assert same(_seen(model, case), want), "a copy changes the original"


def bf16(case: Model) -> None:
    """The model and its adapters in bf16: outputs and gradients are finite, and outputs are the wide ones' nearly."""
    dtype = torch.bfloat16
    try:
        _seen(case.built().to(dtype), case, dtype)
    except Exception as error:
        raise NotOurs(f"{type(error).__name__}: {error}") from error
    model = case.built().to(dtype)
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=case.targets))
    randomise(model, scale=0.1)
    found = outputs(model, case, dtype)
    _loss(found).backward()
    assert all(value.isfinite().all() for value in [*found, *_gradients(model).values()]), "not finite"
    plain = _seen(case.built().to(dtype), case, dtype)
    assert not same(found, plain), "adapters do not act"
    hilora.merge(model)


def checkpointing(case: Model) -> None:
    """Gradients under checkpointing, the model's own where it has some, are those without."""
    model = _injected(case).train()
    for module in model.modules():  # what is drawn and what counts batches would differ between the passes
        if isinstance(module, nn.Dropout | nn.modules.batchnorm._BatchNorm) or type(module).__name__ == "DropPath":
            module.eval()
    _loss(outputs(model, case)).backward()
    want = _gradients(model)
    for turn_on in _ways(model):
        other = copy.deepcopy(model)
        other.zero_grad()
        _loss(turn_on(other, case)).backward()
        found = _gradients(other)
        assert found.keys() == want.keys(), "other gradients"
        assert _close(list(found.values()), list(want.values()), 1e-5), "other gradients"


def _ways(model: Any) -> Iterator[Callable[[Any, Model], list[Tensor]]]:
    """Of checkpointing: the whole model, and as it does so itself."""

    def whole(model: Any, case: Model) -> list[Tensor]:
        args, named = case.inputs()
        torch.manual_seed(0)
        run: Any = checkpoint
        return _tensors(run(model, *args, use_reentrant=False, **named))

    def own(model: Any, case: Model) -> list[Tensor]:
        switch = getattr(model, "set_grad_checkpointing", None) or model.gradient_checkpointing_enable
        switch()
        return outputs(model, case)

    yield whole
    try:
        switch = getattr(model, "set_grad_checkpointing", None) or model.gradient_checkpointing_enable
        copied = copy.deepcopy(model)
        (getattr(copied, "set_grad_checkpointing", None) or copied.gradient_checkpointing_enable)()
        assert switch
    except (AttributeError, AssertionError, ValueError):
        return
    yield own


def _if_ours(error: Exception, plain: Callable[[], object]) -> None:
    """Raise an error, or `NotOurs` if the plain model has one, too."""
    try:
        plain()
    except Exception as other:
        raise NotOurs(f"{type(other).__name__}: {other}") from error
    raise error


CHECKS: dict[str, Callable[[Model], None]] = {
    check.__name__: check for check in (inject, acts, gradients, merge, save, compile, copies, bf16, checkpointing)
}
