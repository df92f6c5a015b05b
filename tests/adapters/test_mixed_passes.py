"""A batch of several clients is that many models, whatever the architecture: normalisation, windows, convolutions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, MixedRowsError
from hilora.adapters.callcheck import check_rows
from hilora.adapters.injection import banks
from hilora.adapters.torch_internals import hooks
from tests.helpers import CONFIG, images, injected, random, randomise, same, snapshot, vit
from tests.vits import net, timm_model

QV, OTHERS = ("q", "v"), ("proj", "fc1")
SMALL = {"img_size": 32, "depth": 1}
MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "vit_tiny_patch16_224": (SMALL, "all-linear"),
    "vit_relpos_small_patch16_224": (SMALL, QV),
    "vit_small_patch14_dinov2": ({"img_size": 28, "depth": 1}, "all-linear"),
    "flexivit_small": (SMALL, "all-linear"),
    "samvit_base_patch16": ({"img_size": 64, "depth": 1, "embed_dim": 24, "num_heads": 2}, "all-linear"),
    "deit_tiny_distilled_patch16_224": (SMALL, "all-linear"),
    "deit3_small_patch16_224": (SMALL, "all-linear"),
    "beit_base_patch16_224": ({"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2}, OTHERS),
    "eva02_tiny_patch14_224": ({"img_size": 28, "depth": 1}, ("attn.proj", "mlp.fc2")),
    "cait_xxs24_224": (SMALL, "all-linear"),
    "convit_tiny": ({"img_size": 32, "depth": 2}, "all-linear"),
    "tnt_s_patch16_224": ({"depth": 1}, "all-linear"),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 56, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 24},
        "all-linear",
    ),
    "swinv2_tiny_window8_256": ({"img_size": 64, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 24}, OTHERS),
    "pvt_v2_b0": ({"depths": (1, 1, 1, 1)}, "all-linear"),
    "twins_svt_small": ({"img_size": 64, "depths": (1, 1, 1, 1)}, "all-linear"),
    "coat_lite_tiny": ({"img_size": 64}, QV),
    "edgenext_xx_small": ({}, "all-linear"),
    "xcit_nano_12_p16_224": ({"img_size": 64, "depth": 1}, "all-linear"),  # from here on with BatchNorm
    "mobilevit_xxs": ({}, "all-linear"),
    "tiny_vit_5m_224": ({"depths": (1, 1, 1, 1)}, ("qkv", "fc2")),
    "inception_next_atto": ({"depths": (1, 1, 1, 1)}, "all-linear"),
}
WITH_STATISTICS = list(MODELS)[-4:]


def make(name: str) -> tuple[nn.Module, Tensor]:
    fields, targets = MODELS[name]
    model = timm_model(name, **fields)
    for module in model.modules():  # what is random in training
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            setattr(module, "drop_prob", 0.0)  # noqa: B010
    cfg: Any = model.default_cfg
    size: int = fields.get("img_size") or cfg["input_size"][-1]
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=targets))
    hilora.set_slots(model, leaf=torch.tensor([2, 0]), cluster=torch.tensor([-1, 0]))
    randomise(model)
    return model, images(4, size)


@pytest.mark.parametrize("name", MODELS)
def test_a_mixed_pass_in_training_equals_single_ones(name: str) -> None:
    model, x = make(name)
    before = {key: value.clone() for key, value in model.named_buffers()}
    model.train()
    mixed = model(x)
    each = []
    for client, rows in enumerate(x.chunk(2)):
        hilora.set_slots(model, leaf=torch.tensor([[2, 0][client]]), cluster=torch.tensor([[-1, 0][client]]))
        each.append(model(rows))
    torch.testing.assert_close(mixed, torch.cat(each), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(each[0], model(x[:2]), rtol=1e-2), "the clients differ"
    assert same(dict(model.named_buffers()), before), "running statistics stay"


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_running_statistics_stay_in_eval_until_the_adapters_are_out(name: str) -> None:
    model, _ = make(name)
    layers = [module for module in model.modules() if getattr(module, "running_mean", None) is not None]
    assert layers
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = [module for module in other.modules() if getattr(module, "running_mean", None) is not None]
        other.train()
        assert not any(module.training for module in own)
        other.eval()
        other.train()
        assert not any(module.training for module in own)
        hilora.set_slots(other, leaf=None, cluster=None)
        hilora.merge(other, leaf=0)
        assert all(module.training for module in own), "a merged model is a plain one"
        hilora.unmerge(other)
        assert not any(module.training for module in own)
        hilora.unload(other)
        assert all(module.training for module in own)
        other.eval()
        assert not any(module.training for module in own)


def test_an_error_of_injection_leaves_batch_norm_as_it_was() -> None:
    model = timm_model("xcit_nano_12_p16_224", img_size=64, depth=1).train()
    before = snapshot(model)
    with pytest.raises(ValueError, match="finds no linear layer"):
        hilora.inject(model, HiLoRAConfig(target_modules=("q", "nothing")))
    assert same(snapshot(model), before)
    bad = torch.zeros(1, 2, 64, 64)
    with pytest.raises(RuntimeError, match="channels"):
        hilora.inject(model, HiLoRAConfig(target_modules=("fc1",)), example_input=bad)
    assert same(snapshot(model), before)


class SequenceFirst(nn.Module):
    """Images in, but an encoder that takes tokens first, as PyTorch's does by default, and OpenCLIP's did."""

    def __init__(self, depth: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(7, 24)
        layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(x).transpose(0, 1))
        y: Tensor = self.head(tokens.mean(0))
        return y


class Pixels(SequenceFirst):
    """The same as a ViT whose input is known."""

    image_size = 14

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 7, 7)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.stem(x).flatten(2).transpose(1, 2))


ENCODER = HiLoRAConfig(r=2, target_modules=("linear1",))
SLOTS = torch.tensor([1, 0])
MIXED = r"the first dimension of what encoder\.layers\.0\.linear1 sees is not the batch.*batch_first=True"


def test_models_that_put_the_sequence_first_do_not_mix_clients_in_silence() -> None:
    known = hilora.inject(Pixels(), ENCODER)
    given = hilora.inject(SequenceFirst(), ENCODER, example_input=random(1, 4, 7))
    for model in (known, given):
        before = snapshot(model)
        with pytest.raises(MixedRowsError, match=MIXED):
            hilora.set_slots(model, leaf=SLOTS)
        assert same(snapshot(model), before)
        hilora.set_slots(model, leaf=torch.tensor([0]))
    y = given(random(4, 4, 7))  # one client can have the whole batch
    assert y.shape == (4, 5)


def test_a_model_of_which_nothing_is_known_is_looked_at_with_its_first_mixed_batch() -> None:
    model = hilora.inject(SequenceFirst(), ENCODER)
    x = random(4, 4, 7)  # as many tokens as images: shapes alone do not tell
    hilora.set_slots(model, leaf=SLOTS)
    for other in (copy.deepcopy(model), model):
        for _ in range(2):
            with pytest.raises(MixedRowsError, match=MIXED):
                other(x)
        hilora.set_slots(other, leaf=None)
        hilora.set_slots(other, leaf=torch.tensor([0]))
        other(x)
        with pytest.raises(MixedRowsError, match=MIXED):
            hilora.set_slots(other, leaf=SLOTS)


def test_a_model_whose_input_is_a_sequence_is_seen_to_look_across_rows() -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 32, dropout=0.0)
    model = hilora.inject(nn.Sequential(layer), ENCODER, example_input=random(5, 3, 24))
    with pytest.raises(MixedRowsError, match=r"0\.linear1 sees is not the batch"):
        hilora.set_slots(model, leaf=SLOTS)


def test_good_models_are_looked_at_once() -> None:
    model = hilora.inject(net(), HiLoRAConfig(r=2, target_modules=("linear1", "linear2", "embed")))
    hilora.set_slots(model, leaf=SLOTS)
    randomise(model)
    assert check_rows in hooks(model)
    x = random(4, 3, 7)
    model.train()
    expected = model.eval()(x)
    assert not hooks(model)
    assert {layer.rows_are_the_batch for bank in banks(model) for layer in bank.layers} == {True}
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    assert not hooks(model)
    swapped = model(x.roll(2, 0)).roll(2, 0)
    torch.testing.assert_close(swapped, expected)


def test_a_compiled_model_waits_for_an_eager_pass() -> None:
    torch._dynamo.reset()
    model = hilora.inject(net(), HiLoRAConfig(r=2, target_modules=("linear1",)), example_input=random(2, 3, 7))
    hilora.set_slots(model, leaf=SLOTS)
    randomise(model)
    x = random(4, 3, 7)
    torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))
    torch._dynamo.reset()


def test_vits_are_known_to_be_right_from_injection() -> None:
    model = injected(CONFIG)
    assert {layer.rows_are_the_batch for bank in banks(model) for layer in bank.layers} == {True}
    hilora.set_slots(model, leaf=SLOTS)
    assert not hooks(model)


def test_the_looks_leave_no_trace() -> None:
    model = vit().train()
    model.blocks[1].eval()
    torch.manual_seed(3)
    hilora.inject(model, CONFIG)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    hilora.inject(vit(), CONFIG)
    assert not model.blocks[1].training
    assert model.blocks[0].training
    assert drawn.shape == (1,)
    assert all(parameter.grad is None for parameter in model.parameters())
