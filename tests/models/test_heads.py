"""The classifier, wherever it is."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, HiLoRAError
from hilora.models.heads import find_heads
from hilora.models.wrappers import plain_path, unwrapped
from tests.helpers import CONFIG, images, injected, output, same, values, vit
from tests.vits import lively, mlp, transformers_vit

pytestmark = pytest.mark.slow


class Around(nn.Module):
    """A user's own module with a ViT inside."""

    def __init__(self, vit: nn.Module, **more: nn.Module) -> None:
        super().__init__()
        self.net = vit
        for name, module in more.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        for name, module in self.named_children():
            y = y if name == "net" else module(y)
        return y


def timm_wrapper() -> nn.Module:
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224", num_labels=5, model_args={"img_size": 32, "depth": 1}
    )
    return lively(transformers.TimmWrapperForImageClassification(config))


def yolos() -> nn.Module:
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 8}
    config = transformers.YolosConfig(num_hidden_layers=1, image_size=[16, 16], num_labels=5, **sizes)
    return lively(transformers.YolosForObjectDetection(config))


def compiled(model: nn.Module) -> nn.Module:
    found: Any = torch.compile(model, backend="eager")
    assert isinstance(found, nn.Module)
    return found


bare = lambda: vit(num_classes=0)  # noqa: E731
HEADS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "Lightning": (lambda: Around(vit()), {"net.head"}),
    "Lightning, twice": (lambda: Around(Around(vit())), {"net.net.head"}),
    "beside a ViT": (lambda: Around(bare(), fc=nn.Linear(24, 5)), {"fc"}),
    "beside a ViT, two layers": (
        lambda: Around(bare(), mlp=nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 9), nn.GELU(), nn.Linear(9, 5))),
        {"mlp"},
    ),
    "around what is beside a ViT": (lambda: Around(Around(bare(), fc=nn.Linear(24, 5))), {"net.fc"}),
    "after a ViT": (lambda: nn.Sequential(bare(), nn.Linear(24, 5)), {"1"}),
    "a sequence of one": (lambda: nn.Sequential(vit()), {"0.head"}),
    "DataParallel": (lambda: nn.DataParallel(vit()), {"module.head"}),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(vit()), {"module.head"}),
    "compiled": (lambda: compiled(vit()), {"_orig_mod.head"}),
    "compiled inside": (lambda: Around(compiled(vit())), {"net._orig_mod.head"}),
    "timm in transformers": (timm_wrapper, {"timm_model.head"}),
    "transformers": (transformers_vit, {"classifier"}),
    "detection": (yolos, {"class_labels_classifier", "bbox_predictor"}),
    "none": (mlp, set()),
    "a ViT that has none": (bare, set()),
}


@pytest.mark.parametrize(("make", "paths"), HEADS.values(), ids=HEADS.keys())
def test_heads_are_found_through_wrappers(make: Callable[[], nn.Module], paths: set[str]) -> None:
    model = make()
    found = find_heads(model)
    assert {path for path, module in model.named_modules() if any(module is head for head in found)} == paths


def test_heads_can_be_named() -> None:
    model = hilora.inject(vit(), HiLoRAConfig(r=2, modules_to_save=("norm", "head")))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert trained == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    model = hilora.inject(vit(), HiLoRAConfig(r=2, modules_to_save=()))
    assert all("lora_" in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(HiLoRAError, match=r"modules_to_save names 'hed', which the model does not have; it has"):
        hilora.inject(vit(), HiLoRAConfig(modules_to_save=("hed",)))
    for wrong in ("head", (3,), ("",)):
        with pytest.raises(HiLoRAError, match="modules_to_save must be a tuple of names"):
            HiLoRAConfig(modules_to_save=wrong)  # type: ignore[arg-type]


def test_injection_says_that_it_found_no_head() -> None:
    with pytest.warns(UserWarning, match="no classifier head was found in Sequential"):
        hilora.inject(mlp(), HiLoRAConfig(target_modules=("0",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hilora.inject(mlp(), HiLoRAConfig(target_modules=("0",), modules_to_save=()))
        hilora.inject(bare(), HiLoRAConfig())
        hilora.inject(vit(), HiLoRAConfig())


def test_named_heads_are_saved(tmp_path: Path) -> None:
    config = HiLoRAConfig(r=2, modules_to_save=("norm",))
    model = injected(config)
    with torch.no_grad():
        model.norm.weight.add_(1)
    hilora.save_adapters(model, tmp_path / "a")
    other = hilora.load_adapters(vit(), tmp_path / "a")
    assert same(output(other, images(2)), output(model, images(2)))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": compiled,
    "DataParallel": nn.DataParallel,
    "averaged": torch.optim.swa_utils.AveragedModel,
    "compiled and averaged": lambda model: torch.optim.swa_utils.AveragedModel(compiled(model)),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_files_of_wrapped_models_are_those_of_the_models(
    wrap: Callable[[nn.Module], nn.Module], tmp_path: Path
) -> None:
    model = injected()
    with torch.no_grad():
        model.head.bias.add_(1)
    hilora.save_adapters(model, tmp_path / "plain")
    hilora.save_adapters(wrap(model), tmp_path / "wrapped")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()
    assert {name for name in load_file(tmp_path / "wrapped") if "head" in name} == {
        "head.head.weight",
        "head.head.bias",
    }
    for fresh in (vit(), hilora.inject(vit(), CONFIG)):
        other = wrap(fresh)
        assert hilora.load_adapters(other, tmp_path / "wrapped") is other
        assert same(values(other), values(model))
        torch.testing.assert_close(output(other, images(2)), output(model, images(2)))


def test_what_is_done_through_a_wrapper_is_done_to_the_model() -> None:
    model = injected()
    wrapper = compiled(model)
    before = output(model, images(2))
    hilora.set_active_tier(wrapper, "leaf")
    assert model.head.weight.requires_grad
    hilora.merge(wrapper)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    hilora.unmerge(model)
    assert torch.equal(output(model, images(2)), before)
    with hilora.disable_adapters(wrapper):
        assert not torch.equal(output(model, images(2)), before)
    assert hilora.unload(wrapper) is wrapper
    torch._dynamo.reset()


def test_paths_and_models_are_unwrapped() -> None:
    assert plain_path("_orig_mod.net._fsdp_wrapped_module.head.weight") == "net.head.weight"
    assert plain_path("module.head") == "module.head", "a user may call a module so"
    model = vit()
    assert unwrapped(nn.DataParallel(compiled(model))) is model
    assert unwrapped(model) is model


@pytest.mark.parametrize("inside", [False, True], ids=["to be seen in a forward pass", "seen at once"])
def test_a_module_around_a_vit_can_be_compiled_whole_before_its_first_pass(inside: bool) -> None:
    torch._dynamo.reset()
    model = Around(bare(), fc=nn.Linear(24, 5)) if inside else Around(nn.Linear(8, 8), fc=nn.Linear(8, 5))
    x = images(2) if inside else torch.randn(2, 8)
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("q",) if inside else ("net",), modules_to_save=("fc",)))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()
