"""q, k and v of PyTorch's own attention."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, HiLoRAError, MixedRowsError, TieredLoRALinear
from hilora.models.attention import OpenAttention
from hilora.models.targets import Target
from tests.helpers import gradients, images, output, random, randomise, same, snapshot
from tests.vits import lively, net, torchvision_vit

QV = HiLoRAConfig(r=2, target_modules=("q", "v"))


class Clip(nn.Module):
    """A block of CLIP as OpenAI wrote it: the sequence comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(24, 2)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        y: Tensor = self.head(self.attn(x, x, x, need_weights=False)[0].mean(0))
        return y


def clip() -> nn.Module:
    torch.manual_seed(0)
    return lively(Clip())


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "torchvision": (torchvision_vit, images(4)),
    "an encoder": (net, random(4, 3, 7)),
    "CLIP": (clip, random(4, 3, 24)),
}


@pytest.mark.parametrize(("make", "x"), MODELS.values(), ids=MODELS.keys())
def test_slices_of_a_packed_projection_are_adapted(make: Callable[[], nn.Module], x: Tensor, tmp_path: Path) -> None:
    model, fresh = make(), make()
    plain, before = output(model, x), snapshot(model)
    hilora.inject(model, QV, example_input=x)
    assert torch.equal(output(model, x), plain)
    state = model.state_dict()
    assert {key for key in state if "lora" not in key} == set(before["state"])
    attentions = [path for path, module in model.named_modules() if isinstance(module, OpenAttention)]
    assert {key for key in state if "lora_A.leaf" in key} == {f"{path}.in_proj.lora_A.leaf" for path in attentions}
    randomise(model)
    adapted = output(model, x)
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    torch.testing.assert_close(model(x).detach(), adapted, msg="without gradients, there is a fast path")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, x), adapted)
    again = hilora.inject(make(), QV, example_input=x)
    again.load_state_dict(model.state_dict())
    assert torch.equal(output(again, x), adapted)
    again.load_state_dict({name: value + 1 for name, value in state.items()})
    first = again.get_submodule(f"{attentions[0]}.in_proj")
    assert isinstance(first, TieredLoRALinear)
    assert torch.equal(first.frozen_weight, state[f"{attentions[0]}.in_proj_weight"] + 1)
    hilora.save_adapters(model, tmp_path / "a")
    torch.testing.assert_close(output(hilora.load_adapters(make(), tmp_path / "a"), x), adapted)
    hilora.merge(model)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(output(fresh, x), adapted, rtol=1e-4, atol=1e-4)
    hilora.unmerge(model)
    assert torch.equal(output(model, x), adapted)
    hilora.unload(model)
    assert list(model.state_dict()) == list(before["state"])
    assert not any(isinstance(module, OpenAttention) for module in model.modules())
    assert torch.equal(output(model, x), plain)


def test_only_q_and_v_change_and_train() -> None:
    model = hilora.inject(clip(), QV, example_input=random(1, 3, 24))
    randomise(model)
    layer = model.get_submodule("attn.in_proj")
    assert isinstance(layer, TieredLoRALinear)
    changed = (layer.weight - layer.frozen_weight).abs().amax(1) > 0
    assert changed.nonzero().flatten().tolist() == [*range(24), *range(48, 72)]
    hilora.set_active_tier(model, "cluster")
    model(random(4, 3, 24)).square().sum().backward()
    assert any(grad.any() for grad in gradients(model))
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained == {f"attn.in_proj.lora_{factor}.cluster" for factor in "AB"} | {"head.weight", "head.bias"}


def test_an_error_leaves_the_attention_as_it_was() -> None:
    model = clip()
    model.add_module("fc1", nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(hilora.UncalledLayerError):
        hilora.inject(model, HiLoRAConfig(r=2, target_modules=("q", "fc1")), example_input=random(1, 3, 24))
    assert same(snapshot(model), before)


def test_what_an_attention_offers() -> None:
    assert hilora.find_targets(clip(), ("q", "v")) == [
        Target("attn.q", "attn.in_proj", (0, 24)),
        Target("attn.v", "attn.in_proj", (48, 24)),
    ]
    assert hilora.find_targets(clip(), ("in_proj",)) == [Target("attn.in_proj", "attn.in_proj", (0, 72))]
    other = nn.ModuleDict({"attn": nn.MultiheadAttention(24, 2, kdim=8, vdim=8)})
    assert [target.path for target in hilora.find_targets(other)] == ["attn.out_proj"], "q, k, v of several widths"


def test_what_an_attention_cannot_do_is_refused(tmp_path: Path) -> None:
    model = hilora.inject(torchvision_vit(), QV)
    with pytest.raises(MixedRowsError, match=r"self_attention\.in_proj by its weight"):
        hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    with pytest.raises(HiLoRAError, match=r"in_proj is of an nn\.MultiheadAttention, which PEFT adapts"):
        hilora.export_peft(model, tmp_path)
