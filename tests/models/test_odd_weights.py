"""Weights and sizes as people have them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from hilora.errors import FileError, InvalidValueError
from hilora.models.backbone import load_backbone


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    torch.manual_seed(0)
    return dict(timm.create_model("test_vit").state_dict())


def test_a_file_without_a_classifier_is_as_good_as_one_with_it(state: dict[str, Any], tmp_path: Path) -> None:
    bare = {name: value for name, value in state.items() if not name.startswith("head.")}
    assert len(bare) < len(state)
    torch.save(state, tmp_path / "whole.pth")
    torch.save(bare, tmp_path / "bare.pth")
    models = [load_backbone("test_vit", tmp_path / f"{name}.pth").model for name in ("whole", "bare")]
    first, second = (model.state_dict() for model in models)
    assert first.keys() == second.keys() == bare.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_other_weights_that_are_missing_are_named(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({name: value for name, value in state.items() if "blocks.1." not in name}, tmp_path / "w.pth")
    with pytest.raises(InvalidValueError, match=r"blocks\.1\."):
        load_backbone("test_vit", tmp_path / "w.pth")


class Call:
    """Pickled, it is a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code of the file has run",)


def test_a_call_in_a_file_is_refused_in_words_of_our_own(
    state: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=1.0)}, tmp_path / "plain.pth")
    assert load_backbone("test_vit", tmp_path / "plain.pth").features == 64
    torch.save({"state_dict": state, "args": Call()}, tmp_path / "call.pth")
    with pytest.raises(FileError, match=r"call\.pth") as caught:
        load_backbone("test_vit", tmp_path / "call.pth")
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_a_model_without_a_size_of_images_says_so() -> None:
    with pytest.raises(InvalidValueError, match="resnet18 takes images of any size and no img_size"):
        load_backbone("resnet18", size=96)


def test_weights_that_are_not_finite_are_named(state: dict[str, Any], tmp_path: Path) -> None:
    broken = {**state, "blocks.0.attn.qkv.weight": state["blocks.0.attn.qkv.weight"] / 0}
    torch.save(broken, tmp_path / "w.pth")
    with pytest.raises(FileError, match=r"w\.pth are not finite: blocks\.0\.attn\.qkv\.weight"):
        load_backbone("test_vit", tmp_path / "w.pth")
