"""The folders that PEFT itself loads and saves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, HiLoRAError
from tests.helpers import CONFIG, images, injected, output, random, randomise, same, snapshot, vit
from tests.vits import lively, timm_model, torchvision_vit, transformers_vit

SMALL: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def foreign(kind: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(**SMALL)
        return lively(getattr(transformers, f"{kind}ForImageClassification")(config))

    return make


def probe() -> nn.Module:
    torch.manual_seed(0)
    return lively(nn.Sequential(vit(num_classes=0), nn.Linear(24, 5)))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Tensor]] = {
    "timm ViT": (vit, ("q", "v", "fc1"), images(2)),
    "timm ViT, whole qkv": (vit, ("qkv", "proj"), images(2)),
    "timm CaiT, separate q and v": (
        lambda: timm_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=1, num_heads=2),
        ("q", "v"),
        images(2, 32),
    ),
    "timm PVT, q and kv": (
        lambda: timm_model("pvt_v2_b0", depths=(1, 1, 1, 1), embed_dims=(8, 16, 40, 64)),
        ("q", "v"),
        images(1, 64),
    ),
    "transformers ViT": (transformers_vit, ("q", "v", "proj"), images(2)),
    "transformers DINOv2": (foreign("Dinov2"), ("q", "v"), images(2)),
    "transformers DeiT": (foreign("DeiT"), ("q", "v", "fc2"), images(2)),
    "transformers ViT-MSN": (foreign("ViTMSN"), ("q", "k", "v"), images(2)),
    "torchvision": (torchvision_vit, ("fc1", "fc2"), images(2)),
    "timm DINOv2": (lambda: lively(vit(init_values=0.1, reg_tokens=2)), ("q", "v", "fc2"), images(2)),
    "a ViT and a head of one's own": (probe, ("q", "v"), images(2)),
}


LATEST = tuple(map(int, peft.__version__.split(".")[:2])) >= (0, 15)
if LATEST:  # those before now and then take `head_dist` for `head`
    MODELS["timm DeiT distilled"] = (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2),
        ("q", "v"),
        images(2, 32),
    )


@pytest.mark.parametrize(("make", "targets", "x"), MODELS.values(), ids=MODELS.keys())
def test_peft_loads_what_was_exported_and_it_comes_back(
    make: Callable[[], nn.Module], targets: tuple[str, ...], x: Tensor, tmp_path: Path
) -> None:
    model = hilora.inject(make(), HiLoRAConfig(r={"root": 3, "cluster": 2, "leaf": 1}, target_modules=targets))
    randomise(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".lora_" not in name:
                parameter.add_(0.5)
    expected = output(model, x)
    assert not torch.allclose(expected, output(make(), x), atol=1e-3)
    assert hilora.export_peft(model, tmp_path) == 0.0
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    torch.testing.assert_close(output(loaded, x), expected, rtol=1e-5, atol=1e-5)
    other = hilora.inject(make(), HiLoRAConfig(r=6, lora_alpha=3, target_modules=targets))
    assert hilora.import_peft(other, tmp_path, "cluster") is other
    torch.testing.assert_close(output(other, x), expected, rtol=1e-5, atol=1e-5)


def test_a_client_s_path_is_exported_and_not_another(tmp_path: Path) -> None:
    model = injected()
    hilora.set_slots(model, cluster=torch.tensor([0, 1]), leaf=torch.tensor([0, 2]))
    randomise(model, seed=3)
    hilora.set_slots(model, cluster=torch.tensor([1]), leaf=torch.tensor([2]))
    hilora.export_peft(model, tmp_path / "whole", cluster=1, leaf=2)
    loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "whole"))
    torch.testing.assert_close(output(loaded, images(2)), output(model, images(2)), rtol=1e-5, atol=1e-5)
    hilora.set_slots(model, cluster=torch.tensor([1]), leaf=torch.tensor([-1]))
    hilora.export_peft(model, tmp_path / "part", cluster=1, leaf=-1)
    loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "part"))
    torch.testing.assert_close(output(loaded, images(2)), output(model, images(2)), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].r == 2 * (3 + 2)
    assert loaded.peft_config["default"].modules_to_save is None, "the head was not trained"


def test_a_merged_and_a_wrapped_model_export_the_same(tmp_path: Path) -> None:
    model = injected()
    hilora.export_peft(model, tmp_path / "a")
    compiled: Any = torch.compile(model, backend="eager")
    hilora.export_peft(compiled, tmp_path / "b")
    hilora.merge(model)
    hilora.export_peft(nn.DataParallel(model), tmp_path / "c")
    files = ["adapter_config.json", "adapter_model.safetensors"]
    first, *others = [[(tmp_path / folder / name).read_bytes() for name in files] for folder in "abc"]
    assert all(other == first for other in others)


def test_one_adapter_a_tier(tmp_path: Path) -> None:
    model = injected()
    with torch.no_grad():
        model.head.bias += 1
    hilora.export_peft(model, tmp_path, stacked=False)
    assert sorted(os.listdir(tmp_path)) == ["cluster", "leaf", "root"]
    loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path / "root"), "root")
    for tier in ("cluster", "leaf"):
        loaded.load_adapter(str(tmp_path / tier), tier)
    loaded.base_model.set_adapter(["root", "cluster", "leaf"])
    torch.testing.assert_close(output(loaded, images(2)), output(model, images(2)), rtol=1e-5, atol=1e-5)


def test_a_smaller_rank_is_the_best_one_and_its_error_is_told(tmp_path: Path) -> None:
    model = injected()
    error = hilora.export_peft(model, tmp_path, rank=4)
    loaded = peft.PeftModel.from_pretrained(vit(), str(tmp_path))
    squares = whole = 0.0
    for index in range(2):
        delta = model.get_submodule(f"blocks.{index}.attn.qkv").delta_weight().detach()
        kept = loaded.base_model.model.blocks[index].attn.qkv.get_delta_weight("default").detach()
        singular = torch.linalg.svdvals(delta)
        torch.testing.assert_close((delta - kept).norm(), singular[4:].norm())
        squares, whole = squares + float((delta - kept).norm() ** 2), whole + float(delta.norm() ** 2)
    assert error == pytest.approx((squares / whole) ** 0.5, rel=1e-4)
    assert hilora.export_peft(model, tmp_path, rank=12) == 0.0
    with pytest.raises(HiLoRAError, match="rank must be a whole number"):
        hilora.export_peft(model, tmp_path, rank=0)


def trained_by_peft(folder: Path, make: Callable[[], nn.Module] = transformers_vit, **fields: Any) -> nn.Module:
    """A model of PEFT's with random adapters, saved."""
    torch.manual_seed(0)
    model: nn.Module = peft.get_peft_model(make(), peft.LoraConfig(**fields)).eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(random(*parameter.shape, seed=seed) * 0.3)
    model.save_pretrained(str(folder))  # type: ignore[operator]
    return model


FIELDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 3},
    "rsLoRA": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "ranks and scales of their own": {
        "r": 2,
        "rank_pattern": {"v_proj": 4, "value": 4},
        "alpha_pattern": {"layers.0.attention.q_proj": 5, "layer.0.attention.attention.query": 5},
    },
    "with the classifier": {"r": 4, "modules_to_save": ["classifier"]},
}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS.keys())
def test_what_peft_trained_is_imported(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained_by_peft(tmp_path, target_modules=r".*\.(q_proj|v_proj|query|value)", **fields)
    ours = hilora.inject(transformers_vit(), HiLoRAConfig(r=4))
    hilora.set_slots(ours, leaf=torch.tensor([1]))
    hilora.import_peft(ours, tmp_path, "leaf", slot=1)
    torch.testing.assert_close(output(ours, images(2)), output(theirs, images(2)), rtol=1e-5, atol=1e-5)
    hilora.set_slots(ours, leaf=torch.tensor([0]))
    assert not torch.allclose(output(ours, images(2)), output(theirs, images(2)), atol=1e-3), "the other is as it was"


def test_a_layer_that_the_folder_lacks_can_still_be_trained(tmp_path: Path) -> None:
    theirs = trained_by_peft(tmp_path, vit, r=2, target_modules=["fc1"])
    ours = hilora.import_peft(hilora.inject(vit(), HiLoRAConfig(r=2, target_modules=("q", "fc1"))), tmp_path, "root")
    torch.testing.assert_close(output(ours, images(2)), output(theirs, images(2)), rtol=1e-5, atol=1e-5)
    ours(images(2)).square().sum().backward()
    assert ours.get_parameter("blocks.0.attn.qkv.lora_B.root").grad.any()  # type: ignore[union-attr]


def changed(**fields: Any) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        change(found)
        save_file(found, folder / "adapter_model.safetensors")

    return rewrite


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


KEY = "base_model.model.blocks.0.attn.qkv.lora_B.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "DoRA": (changed(use_dora=True), "use_dora=True: only W x"),
    "biases": (changed(bias="lora_only"), "bias='lora_only'"),
    "PiSSA": (changed(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "another method": (changed(peft_type="IA3"), "describes 'IA3': expected peft_type LORA"),
    "another rank": (changed(r=3), "says rank 3 for blocks.0.attn.qkv, its adapter has 2"),
    "a rank that is none": (changed(r="many"), "no number for r of blocks.0.attn.qkv"),
    "a pattern that is none": (changed(rank_pattern={"(": 2}), "no number for r"),
    "no config": (lambda folder: (folder / "adapter_config.json").unlink(), "there is no adapter_config.json"),
    "a config that is no JSON": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        "adapter_config.json cannot be read",
    ),
    "a pickle": (pickled, "a pickle, which can run code when it is read: ask whoever made it for adapter_model.safe"),
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no file of adapters"),
    "integers": (tensors(lambda t: t.update({KEY: t[KEY].long()})), "is torch.int64, expected one of float16"),
    "not finite": (tensors(lambda t: t[KEY].fill_(torch.nan)), "is not finite"),
    "a factor is missing": (tensors(lambda t: t.pop(KEY)), r"expected A \[r, in\] and B \[out, r\]"),
    "another width": (tensors(lambda t: t.update({KEY: torch.ones(9, 2)})), "24 → 9 for blocks.0.attn.qkv"),
    "k, which is not adapted": (tensors(lambda t: t[KEY].fill_(1)), "of which the model adapts q, v alone"),
    "another layer": (
        tensors(lambda t: t.update({KEY.replace("qkv", "proj"): t.pop(KEY)})),
        r"expected A \[r, in\]",
    ),
    "a module that is no head": (
        tensors(lambda t: t.update({"base_model.model.norm.weight": torch.ones(24)})),
        "saves norm.weight, which is not of the model's head",
    ),
    "another head": (
        tensors(lambda t: t.update({"base_model.model.head.weight": torch.ones(9, 24)})),
        r"has head.weight \(9, 24\), the model \(5, 24\)",
    ),
    "what has no meaning": (
        tensors(lambda t: t.update({KEY.replace("lora_B", "lora_magnitude_vector"): torch.ones(2)})),
        "lora_magnitude_vector.weight, which has no meaning here",
    ),
}


@pytest.mark.parametrize(("break_", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_has_no_meaning_is_refused_and_changes_nothing(
    break_: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    hilora.export_peft(hilora.inject(vit(), HiLoRAConfig(r=1, tiers=("a",))), tmp_path)
    break_(tmp_path)
    model = injected()
    before = snapshot(model)
    with pytest.raises(HiLoRAError, match=message):
        hilora.import_peft(model, tmp_path, "root")
    assert same(snapshot(model), before)


def test_ranks_and_layers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    hilora.export_peft(injected(HiLoRAConfig(r=1, tiers=("a", "b"), target_modules=("fc1",))), tmp_path)
    with pytest.raises(HiLoRAError, match=r"adapts blocks.0.mlp.fc1, blocks.1.mlp.fc1, which the model does not"):
        hilora.import_peft(injected(), tmp_path, "root")
    model = hilora.inject(vit(), HiLoRAConfig(r=1, target_modules=("fc1",)))
    with pytest.raises(HiLoRAError, match="rank 2, tier 'root' has room for 1: inject with a larger r"):
        hilora.import_peft(model, tmp_path, "root")
    with pytest.raises(IndexError, match="no slot 3"):
        hilora.import_peft(injected(HiLoRAConfig(target_modules=("fc1",))), tmp_path, "root", slot=3)


@pytest.mark.parametrize("slots", [{"root": -1, "cluster": -1, "leaf": -1}, {"lief": 0}, {"leaf": 4}])
def test_what_cannot_be_exported_is_an_error_and_leaves_nothing(slots: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(HiLoRAError, match=r"nothing to export|no slot 4"):
        hilora.export_peft(injected(CONFIG), tmp_path / "new", **slots)
    with pytest.raises(HiLoRAError, match="was wrapped by itself"):
        hilora.export_peft(hilora.TieredLoRALinear(nn.Linear(3, 3)), tmp_path / "new")
    assert not os.listdir(tmp_path)


class Pair(nn.Module):
    """A model with layers whose paths end like those of others."""

    def __init__(self) -> None:
        super().__init__()
        self.vit, self.other = vit(), nn.ModuleDict({"vit": vit(seed=1)})

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.vit(x) + self.other["vit"](x)
        return y


def test_a_layer_s_rank_is_not_taken_for_that_of_another_whose_path_ends_alike(tmp_path: Path) -> None:
    targets = ("vit.blocks.0.attn.q", "vit.blocks.1.attn.q", "other.vit.blocks.0.attn.v", "vit.blocks.1.attn.v")
    model = hilora.inject(Pair().eval(), HiLoRAConfig(r=2, target_modules=targets))
    randomise(model)
    hilora.export_peft(model, tmp_path)
    ranks = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert ranks == {r"^vit\.blocks\.0\.attn\.qkv": 6}
    if LATEST:
        loaded = peft.PeftModel.from_pretrained(Pair().eval(), str(tmp_path))
        torch.testing.assert_close(output(loaded, images(2)), output(model, images(2)), rtol=1e-5, atol=1e-5)
