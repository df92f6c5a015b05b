"""Models whose frozen weights torchao has quantised: `make compat` runs these, where it is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import hilora
from hilora import HiLoRAConfig, HiLoRAError
from tests.helpers import gradients, images, injected, output, randomise, same, values, vit


@pytest.mark.parametrize("quantised", ["before injection", "after it"])
def test_a_quantised_model_is_adapted(quantised: str, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = vit(), images(40)
    config = HiLoRAConfig(r=2, target_modules=("q", "v", "fc1"))

    def quantise(model: nn.Module) -> None:
        linear = lambda module, path: isinstance(module, nn.Linear) and path != "head"  # noqa: E731
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=linear)

    if quantised == "after it":
        hilora.inject(model, config)
    quantise(model)
    plain = output(model, x)
    if quantised == "before injection":
        hilora.inject(model, config)
    assert torch.equal(output(model, x), plain)
    assert not torch.equal(plain, output(vit(), x))
    randomise(model)
    hilora.set_active_tier(model, "leaf")
    model(x).square().sum().backward()
    assert any(gradient.any() for gradient in gradients(model))
    adapted = output(model, x)
    hilora.save_adapters(model, tmp_path / "a")
    other = vit()
    quantise(other)
    hilora.load_adapters(other, tmp_path / "a")
    assert torch.equal(output(other, x), adapted)
    with pytest.raises(HiLoRAError, match="adapters of other frozen weights"):
        hilora.load_adapters(vit(), tmp_path / "a")
    hilora.merge(model)
    assert type(model.blocks[0].attn.qkv.weight) is nn.Parameter, "merged weights are not quantised"
    torch.testing.assert_close(output(model, x), adapted, rtol=1e-4, atol=1e-4)
    hilora.unmerge(model)
    assert torch.equal(output(model, x), adapted)
    assert torch.equal(output(hilora.unload(model), x), plain)


def test_a_head_is_not_loaded_over_a_quantised_one(tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model = injected()
    with torch.no_grad():
        model.head.weight.add_(1)
    hilora.save_adapters(model, tmp_path / "a")
    other = injected()
    quantization.quantize_(other.head, quantization.Int8WeightOnlyConfig())
    before = values(other)
    with pytest.raises(HiLoRAError, match="that of the model is quantised: load the file, then quantise"):
        hilora.load_adapters(other, tmp_path / "a", check_base=False)
    assert same(values(other), before)
