from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, UncalledLayerError
from tests.helpers import CONFIG, images, random, same, snapshot, vit
from tests.vits import mlp


def spare() -> nn.Module:
    """A ViT with layers that nothing uses."""
    model = vit()
    for block in model.blocks:
        block.attn.spare = nn.Linear(24, 24)
    assert isinstance(model, nn.Module)
    return model


def test_a_layer_that_is_never_called_is_an_error_and_the_model_as_it_was() -> None:
    model = spare()
    for module in list(model.modules())[::2]:
        module.train()
    next(model.parameters()).requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(
        UncalledLayerError, match=r"never calls 2 of the adapted layers \(.*Choose other target_modules"
    ):
        hilora.inject(model, HiLoRAConfig(target_modules=("spare", "fc1")))
    assert same(snapshot(model), before)
    hilora.inject(model, HiLoRAConfig(target_modules=("fc1", "fc2")))


class Bypass(nn.Module):
    """Uses one of its two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(x)
        return y


def test_other_models_are_checked_with_an_example_or_in_their_first_forward_pass() -> None:
    model = Bypass()
    before = snapshot(model)
    with pytest.raises(UncalledLayerError, match=r"never calls 1 of the adapted layers \(fc1…\)"):
        hilora.inject(model, HiLoRAConfig(target_modules=("fc1", "fc2")), example_input=random(1, 7))
    assert same(snapshot(model), before)
    hilora.inject(model, HiLoRAConfig(target_modules=("fc1", "fc2")))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(UncalledLayerError, match=r"\(fc1…\)"):
            other(random(1, 7))
        assert sum(len(module._forward_pre_hooks) for module in (other.fc1, other.fc2)) == 0
        assert not other._forward_hooks
        other(random(1, 7))


def test_the_first_forward_pass_of_a_good_model_removes_the_check() -> None:
    model = hilora.inject(mlp(), HiLoRAConfig(target_modules=("0",)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        with pytest.raises(ValueError, match="do not fit"):
            other(random(1, 6))
        other(random(1, 7))
        assert not other._forward_hooks
        assert not other.get_submodule("0")._forward_pre_hooks


def test_a_check_that_waits_ends_when_the_adapters_are_taken_out() -> None:
    for make in (mlp, Bypass):
        model = make()
        before = snapshot(model)
        hilora.inject(model, HiLoRAConfig(target_modules=("0" if make is mlp else "fc1",)))
        assert model._forward_hooks
        hilora.unload(model)
        assert snapshot(model)["hooks"] == before["hooks"]
        model(random(1, 7))


def test_a_check_that_waits_ends_when_loading_fails(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wide = hilora.inject(nn.Sequential(nn.Linear(8, 24)), HiLoRAConfig(target_modules=("0",)))
    hilora.save_adapters(wide, path)
    model = nn.Sequential(nn.Linear(7, 24))
    before = snapshot(model)
    with pytest.raises(ValueError, match="do not fit tier 'root'"):
        hilora.load_adapters(model, path)
    assert same(snapshot(model), before)


def test_an_example_that_the_model_refuses_leaves_it_as_it_was() -> None:
    model = vit()
    before = snapshot(model)
    with pytest.raises(AssertionError, match="Input height"):
        hilora.inject(model, CONFIG, example_input=images(1, 24))
    assert same(snapshot(model), before)


def test_a_guessed_image_that_does_not_fit_postpones_the_check() -> None:
    class Half(type(vit())):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-1] == 16:
                raise RuntimeError("needs another size")
            return super().forward(x)  # type: ignore[no-any-return]

    model = vit()
    model.__class__ = Half
    hilora.inject(model, CONFIG)
    assert model._forward_hooks
