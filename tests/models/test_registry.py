"""Families of models: what is known of each, and how one is added."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.data import resolve_model_data_config
from torch import nn

import hilora
from hilora import HiLoRAConfig
from hilora.models import families as folder
from hilora.models.backbone import load_backbone
from hilora.models.registry import Family, aliases, families, family_of
from hilora.models.targets import find_targets
from tests.helpers import vit
from tests.vits import mlp, net, timm_model, torchvision_vit, transformers_vit

CASES = {
    "timm": (vit, "timm", (16, 16), ["head"]),
    "timm, two heads": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
        "timm",
        (32, 32),
        ["head", "head_dist"],
    ),
    "timm, without a patch embedding": (lambda: timm_model("mobilevit_xxs"), "timm", (256, 256), ["head.fc"]),
    "transformers": (transformers_vit, "transformers", (16, 16), ["classifier"]),
    "torchvision": (torchvision_vit, "torchvision", (16, 16), ["heads"]),
}


@pytest.mark.parametrize(("make", "name", "size", "heads"), CASES.values(), ids=CASES)
def test_a_model_is_of_the_family_that_knows_it(make, name: str, size: tuple[int, int], heads: list[str]) -> None:
    model = make()
    family = family_of(model)
    assert family.name == name
    assert family.image_size(model) == size
    assert [id(head) for head in family.heads(model)] == [id(model.get_submodule(path)) for path in heads]
    example = family.example(model)
    assert example is not None
    assert example.shape == (1, 3, *size)
    again = family.example(model)
    assert again is not None
    assert torch.equal(example, again)
    model(example)


def test_nothing_is_taken_for_granted_of_a_user_s_module() -> None:
    for model in (net(), mlp(), nn.Conv2d(3, 3, 1)):
        family = family_of(model)
        assert type(family) is Family
        assert family.example(model) is None
        assert family.title(model) == type(model).__name__
    assert len(family_of(net()).heads(net())) == 1
    assert family_of(mlp()).heads(mlp()) == []


def test_models_have_titles() -> None:
    title = family_of(vit()).title
    assert title(vit()) == "VisionTransformer"
    assert title(timm_model("vit_tiny_patch16_224", img_size=32, depth=1)).startswith("vit_tiny_patch16_224")
    assert family_of(transformers_vit()).title(transformers_vit()) == "ViTForImageClassification"


def test_preprocessing_is_the_model_s_own() -> None:
    backbone = load_backbone("glyph_vit")
    expected = resolve_model_data_config(backbone.model)
    assert backbone.mean.tolist() == list(expected["mean"]) == [0.5] * 3
    assert (backbone.size, backbone.features, backbone.name) == (32, 96, "glyph_vit")


NEW = '''
"""A library that was written for a test."""

import torch
from torch import nn

from hilora.models.backbone import Backbone
from hilora.models.registry import Family


class Toy(nn.Module):
    toy_size = 6

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 3)
        self.asker, self.giver, self.topmost = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).mT
        return self.topmost((self.asker(tokens) * self.giver(tokens)).mean(1))


class Toys(Family):
    name = "toys"
    aliases = {"q": ("asker",), "v": ("giver",)}

    def owns(self, model):
        return isinstance(model, Toy)

    def heads(self, model):
        return [model.topmost]

    def image_size(self, model):
        return (6, 6)

    def knows(self, name):
        return name == "toy"

    def load(self, name, weights, size):
        return Backbone(Toy(), name, 6, torch.zeros(3), torch.ones(3), 2)
'''


@pytest.fixture
def a_new_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more file in the folder, and nothing else."""
    (tmp_path / "toys.py").write_text(NEW)
    monkeypatch.setattr(folder, "__path__", [*folder.__path__, str(tmp_path)])
    families.cache_clear()
    yield
    families.cache_clear()
    sys.modules.pop("hilora.models.families.toys", None)


def test_a_family_is_added_by_one_new_file(a_new_file: None) -> None:
    backbone = load_backbone("toy")
    assert (backbone.size, backbone.features) == (6, 2)
    model = hilora.inject(backbone.model, HiLoRAConfig(r=2, target_modules=("q", "v")))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{at}.lora_{f}.root" for at in ("asker", "giver") for f in "AB"] + [
        "topmost.weight",
        "topmost.bias",
    ]
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    assert [t.path for t in find_targets(model, "all-linear")] == ["asker", "giver"]


def test_without_the_file_the_family_is_not_there() -> None:
    assert "asker" not in aliases()["q"]
    assert sorted(family.name for family in families()) == [
        "glyphs",
        "open_clip",
        "timm",
        "torchvision",
        "transformers",
    ]
    with pytest.raises(ValueError, match="no model 'toy'"):
        load_backbone("toy")
