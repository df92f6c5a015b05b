"""Models that use the weight of an adapted layer and never call it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import hilora
from hilora import HiLoRAConfig, HiLoRAError, MixedRowsError, TieredLoRALinear
from hilora.adapters.by_weight import AdaptedWeightLinear
from hilora.adapters.injection import banks
from tests.helpers import TIERS, gradients, images, output, random, randomise, same
from tests.vits import lively, mlp, timm_model, torchvision_vit

SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2}
QV = HiLoRAConfig(r=2, target_modules=("q", "v"))


def swin(version: int) -> nn.Module:
    torch.manual_seed(0)
    of = torchvision.models.swin_transformer
    kinds = {"block": of.SwinTransformerBlockV2, "downsample_layer": of.PatchMergingV2} if version == 2 else {}
    return lively(of.SwinTransformer([4, 4], 24, [1, 1], [1, 2], [4, 4], num_classes=5, **kinds))


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "BEiT": (lambda: timm_model("beit_base_patch16_224", img_size=32, **SMALL), 32),
    "EVA-02": (lambda: timm_model("eva02_tiny_patch14_224", img_size=28, **SMALL), 28),
    "DINOv3 with a bias": (lambda: timm_model("vit_small_patch16_dinov3_qkvb", img_size=32, **SMALL), 32),
    "Swin V2": (
        lambda: timm_model("swinv2_tiny_window8_256", img_size=64, embed_dim=24, depths=(1, 1), num_heads=(1, 2)),
        64,
    ),
    "torchvision's Swin": (lambda: swin(1), 64),
    "torchvision's Swin V2": (lambda: swin(2), 64),
}


def beit() -> nn.Module:
    return MODELS["BEiT"][0]()


@pytest.mark.parametrize(("make", "size"), MODELS.values(), ids=MODELS.keys())
def test_adapters_are_in_the_weight_that_a_model_reads(
    make: Callable[[], nn.Module], size: int, tmp_path: Path
) -> None:
    model, x = make(), images(2, size)
    plain, keys = output(model, x), list(model.state_dict())
    hilora.inject(model, QV)
    assert torch.equal(output(model, x), plain)
    layers = [m for m in model.modules() if isinstance(m, TieredLoRALinear)]
    assert {type(layer) for layer in layers} == {AdaptedWeightLinear}
    assert [key for key in model.state_dict() if "lora" not in key] == keys
    randomise(model)
    adapted = output(model, x)
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    with hilora.disable_adapters(model):
        assert torch.equal(output(model, x), plain)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(other, x), adapted)
    hilora.save_adapters(model, tmp_path / "a")
    torch.testing.assert_close(output(hilora.load_adapters(make(), tmp_path / "a"), x), adapted)
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), adapted, rtol=1e-4, atol=1e-4)
    hilora.unmerge(model)
    assert torch.equal(output(model, x), adapted)
    assert torch.equal(output(hilora.unload(model), x), plain)


class Reader(nn.Module):
    """Uses one layer by its weight, and calls another."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 9), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.linear(x, self.fc1.weight, self.fc1.bias).to(self.fc2.weight.dtype))
        return y


class Caller(Reader):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x))
        return y


def test_gradients_are_those_of_a_model_that_calls_its_layers() -> None:
    found = []
    for kind in (Caller, Reader):
        torch.manual_seed(0)
        x, config = random(6, 7, dtype=torch.float64), HiLoRAConfig(r=2, target_modules=("fc1", "fc2"))
        model = hilora.inject(kind().double(), config, example_input=x).double()
        randomise(model)
        hilora.set_slots(model, cluster=torch.tensor([1]), leaf=torch.tensor([-1]))
        randomise(model, seed=1)
        for tier in TIERS:
            hilora.set_active_tier(model, tier)
            model.zero_grad()
            y = model(x)
            y.sin().sum().backward()
            found.append([y.detach(), *gradients(model)])
    for called, read in zip(found[:3], found[3:], strict=True):
        for got, want in zip(read, called, strict=True):
            torch.testing.assert_close(got, want)
    assert any(grad.any() for grad in found[1]), "of the slot in use"


def test_only_what_is_read_is_adapted_by_its_weight() -> None:
    for example in (random(1, 7), None):
        model = hilora.inject(Reader(), HiLoRAConfig(r=2, target_modules=("fc1", "fc2")), example_input=example)
        randomise(model)
        first = model(random(3, 7))
        assert type(model.fc1) is AdaptedWeightLinear
        assert type(model.fc2) is TieredLoRALinear
        assert torch.equal(model(random(3, 7)), first), "it was right from the first pass on"
    assert type(hilora.inject(mlp(), HiLoRAConfig(target_modules=("0",))).get_submodule("0")) is AdaptedWeightLinear
    waiting = hilora.inject(mlp(), HiLoRAConfig(target_modules=("0",)))
    waiting(random(1, 7))
    assert type(waiting.get_submodule("0")) is TieredLoRALinear


def test_a_plain_state_dict_can_be_put_in_the_place_of_the_weights() -> None:
    model = hilora.inject(beit(), QV)
    randomise(model)
    bank = banks(model)[0]
    bank.grow("leaf", 2)  # which of them is not said yet
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    layer = next(m for m in model.modules() if isinstance(m, AdaptedWeightLinear))
    assert layer.frozen_weight.data_ptr() == state["blocks.0.attn.qkv.weight"].data_ptr()


def test_rows_of_several_clients_cannot_share_a_weight() -> None:
    model = hilora.inject(beit(), QV)
    with pytest.raises(
        MixedRowsError, match=r"the model uses blocks\.0\.attn\.qkv by its weight, which is one for all"
    ):
        hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    assert banks(model)[0].slot_count("leaf") == 1
    model = hilora.inject(Reader(), HiLoRAConfig(r=2, target_modules=("fc1",)))
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    with pytest.raises(HiLoRAError, match=r"by its weight, which (is one|rows of several)"):
        model(random(4, 7))
    model = hilora.inject(beit(), QV)
    bank = banks(model)[0]
    A, B = (table.repeat(1, 2, 1, 1) for table in (bank.A("leaf"), bank.B("leaf")))
    bank.hold("leaf", A, B, torch.tensor([0, 1]))
    with pytest.raises(HiLoRAError, match="which rows of several clients cannot share"):
        model(images(2, 32))


def test_what_a_weight_cannot_do_is_refused() -> None:
    model = beit()
    with pytest.raises(HiLoRAError, match=r"uses blocks\.0\.attn\.qkv by its weight.*lora_dropout=0"):
        hilora.inject(model, HiLoRAConfig(r=2, lora_dropout=0.5))
    assert not any(isinstance(module, TieredLoRALinear) for module in model.modules())
    model = hilora.inject(beit(), QV)
    banks(model)[0].composition = lambda position, x: {}
    with pytest.raises(HiLoRAError, match="does not depend on x"):
        model(images(2, 32))
    model = hilora.inject(Reader(), HiLoRAConfig(r=2, target_modules=("fc1",)), example_input=random(1, 7))
    with pytest.raises(HiLoRAError, match="would write adapters down as they are now"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(TypeError, match="a parametrisation would take their place"):
        register_parametrization(model.get_submodule("fc1"), "weight", nn.Identity())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_keeps_its_dtype(dtype: torch.dtype) -> None:
    model = hilora.inject(beit().to(dtype), QV)
    randomise(model)
    layer = next(m for m in model.modules() if isinstance(m, AdaptedWeightLinear))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        adapted = layer.weight
    assert adapted.dtype == dtype
    torch.testing.assert_close(adapted, (layer.frozen_weight + layer.delta_weight()).to(dtype))
    y = model(images(2, 32, dtype=dtype))
    y.float().square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model))


def test_a_model_that_reads_weights_is_compiled_whole_and_exported() -> None:
    model, x = hilora.inject(beit(), QV), images(2, 32)
    randomise(model)
    hilora.set_active_tier(model, "leaf")
    model(x).square().sum().backward()
    want = [output(model, x), *gradients(model)]
    model.zero_grad()
    torch._dynamo.reset()
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    y.square().sum().backward()
    for got, expected in zip([y.detach(), *gradients(model)], want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    torch.testing.assert_close(program(images(5, 32)), model(images(5, 32)), rtol=1e-4, atol=1e-4)


def test_the_projection_after_pytorchs_attention_is_read() -> None:
    model, x = torchvision_vit(), images(2)
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("proj", "fc1")))
    kinds = {path.rpartition(".")[2]: type(m) for path, m in model.named_modules() if isinstance(m, TieredLoRALinear)}
    assert kinds == {"out_proj": AdaptedWeightLinear, "0": TieredLoRALinear}
    randomise(model)
    adapted = output(model, x)
    torch.testing.assert_close(model(x).detach(), adapted, msg="with gradients, and without, where it has a fast path")
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), adapted, rtol=1e-4, atol=1e-4)


def test_penalty_and_peft_know_adapters_in_weights(tmp_path: Path) -> None:
    model = hilora.inject(beit(), QV)
    randomise(model)
    hilora.set_active_tier(model, "leaf")
    assert hilora.orthogonality_penalty(model) > 0
    before = hilora.get_adapters(model, "leaf")
    hilora.set_adapters(model, "leaf", before)
    assert same(list(hilora.get_adapters(model, "leaf").tensors().values()), list(before.tensors().values()))
