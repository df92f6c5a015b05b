from __future__ import annotations

import torch

import hilora
from benchmarks.float8 import Float8HiLoRA, errors
from hilora.adapters.injection import adapted_layers
from hilora.federated.settings import TrainingSettings
from hilora.models.backbone import Backbone
from tests.helpers import images, vit


def test_errors_are_one_a_block_and_those_of_e4m3() -> None:
    model = vit(num_classes=0)
    of_layers, of_features = errors(Backbone(model, "vit", 16, torch.zeros(3), torch.ones(3), 24), images(4))
    assert {kind: len(each) for kind, each in of_layers.items()} == {
        "attn.qkv": 2, "attn.proj": 2, "mlp.fc1": 2, "mlp.fc2": 2,
    }  # fmt: skip
    assert all(0.01 < error < 0.06 for each in of_layers.values() for error in each)
    assert 1e-4 < of_features < 0.06
    assert not any(isinstance(module, hilora.TieredLoRALinear) for module in model.modules())


def test_the_strategy_keeps_its_base_in_8_bits() -> None:
    config = Float8HiLoRA().adapters(TrainingSettings())
    model = hilora.inject(vit(), config)
    assert {layer.weight.dtype for layer in adapted_layers(model).values()} == {torch.float8_e4m3fn}
