"""The small ViT that comes with the package."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hilora.models import glyph_vit

pytestmark = pytest.mark.slow


def test_weights_fit_and_say_where_they_come_from():
    model = glyph_vit.glyph_vit(7)
    with safe_open(glyph_vit.WEIGHTS, "pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {name for name in model.state_dict() if not name.startswith("head.")}
    assert metadata["made_by"] == "examples/pretrain_glyph_vit.py"
    assert glyph_vit.WEIGHTS.stat().st_size < 1e6
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert glyph_vit.glyph_vit(0)(torch.zeros(2, 3, 32, 32)).shape == (2, 96)


def test_foreign_weights_are_an_error(monkeypatch, tmp_path):
    save_file({"patch_embed.proj.bias": torch.zeros(96)}, tmp_path / "foreign.safetensors")
    monkeypatch.setattr(glyph_vit, "WEIGHTS", tmp_path / "foreign.safetensors")
    with pytest.raises(RuntimeError, match="Missing key"):
        glyph_vit.glyph_vit(5)


def test_pretraining_script_writes_weights(monkeypatch, tmp_path, capsys):
    script = Path(__file__).parents[2] / "examples" / "pretrain_glyph_vit.py"
    out = tmp_path / "made" / "weights.safetensors"
    monkeypatch.setattr(sys, "argv", [script.name, "--out", str(out), "--epochs", "1", "--per-class", "1"])
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        timm.layers.set_fused_attn(True)
    assert "validation accuracy on 282 characters" in capsys.readouterr().out
    with safe_open(out, "pt") as made, safe_open(glyph_vit.WEIGHTS, "pt") as shipped:
        assert set(made.keys()) == set(shipped.keys())
        assert set(made.metadata()) == set(shipped.metadata())
    assert [path.name for path in out.parent.iterdir()] == [out.name]
