"""Backbones: the one that ships, and timm's from local files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from hilora.models.backbone import load_backbone


def test_the_glyph_vit_ships_with_its_weights() -> None:
    backbone = load_backbone("glyph_vit")
    features = backbone.model(torch.zeros(2, 3, backbone.size, backbone.size))
    assert features.shape == (2, backbone.features)
    with pytest.raises(ValueError, match="32"):
        load_backbone("glyph_vit", size=64)


def test_a_timm_model_from_a_local_file_at_another_size(tmp_path: Path) -> None:
    source = timm.create_model("vit_tiny_patch16_224", num_classes=1000)
    weights = tmp_path / "vit.safetensors"
    save_file(source.state_dict(), weights)
    backbone = load_backbone("vit_tiny_patch16_224", weights, 64)
    assert (backbone.size, backbone.features) == (64, 192)
    assert backbone.name == "vit_tiny_patch16_224 (vit.safetensors)"
    assert torch.equal(backbone.model.blocks[3].attn.qkv.weight, source.blocks[3].attn.qkv.weight)  # type: ignore[union-attr, index]
    assert backbone.model(torch.zeros(1, 3, 64, 64)).shape == (1, 192)


class Evil:
    """What a pickle could do that is loaded without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.proof,)


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model 'no_such_model'"):
        load_backbone("no_such_model")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.safetensors"):
        load_backbone("vit_tiny_patch16_224", tmp_path / "nowhere.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone("vit_tiny_patch16_224", broken)
    evil, proof = tmp_path / "evil.pth", tmp_path / "proof"
    evil.write_bytes(pickle.dumps({"model": Evil(proof)}, protocol=2))
    with pytest.raises(ValueError, match="cannot be read"):
        load_backbone("vit_tiny_patch16_224", evil)
    assert not proof.exists()
    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, foreign)
    with pytest.raises(ValueError, match="do not fit"):
        load_backbone("vit_tiny_patch16_224", foreign)
