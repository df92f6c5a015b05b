from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, TieredLoRALinear
from hilora.adapters.injection import banks, head_parameters
from tests.helpers import CONFIG, TIERS, images, injected, output, random, randomise, same, snapshot, values, vit
from tests.vits import Net, mlp, net, timm_model, torchvision_vit, transformers_vit

MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], Tensor, list[tuple[int, int, int]]]] = {
    "tiny": (vit, ("q", "v"), images(2), [(4, 24, 24)]),
    "tiny, everything": (
        vit,
        ("q", "k", "v", "proj", "fc1", "fc2", "head"),
        images(2),
        [(8, 24, 24), (2, 24, 96), (2, 96, 24), (1, 24, 5)],
    ),
    "tiny, no class token": (lambda: vit(class_token=False, global_pool="avg"), ("q", "v"), images(2), [(4, 24, 24)]),
    "ViT-Ti": (lambda: timm_model("vit_tiny_patch16_224", img_size=32), ("q", "v"), images(2, 32), [(24, 192, 192)]),
    "DeiT-Ti distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32),
        ("q", "v", "mlp.fc1"),
        images(2, 32),
        [(24, 192, 192), (12, 192, 768)],
    ),
    "Swin": (
        lambda: timm_model(
            "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(1, 1, 2), num_heads=(1, 2, 4)
        ),
        ("q", "v"),
        images(2, 56),
        [(2, 24, 24), (2, 48, 48), (4, 96, 96)],
    ),
    "CaiT": (
        lambda: timm_model("cait_xxs24_224", img_size=32, embed_dim=24, depth=2, num_heads=2),
        ("q", "v"),
        images(2, 32),
        [(8, 24, 24)],
    ),
    "XCiT": (lambda: timm_model("xcit_nano_12_p16_224", depth=2), ("q", "v"), images(1, 224), [(8, 128, 128)]),
    "PVT": (
        lambda: timm_model("pvt_v2_b0", depths=(1, 1, 1, 1)),
        ("v", "q"),
        images(1, 64),
        [(2, n, n) for n in (32, 64, 160, 256)],
    ),
    "transformers": (
        transformers_vit,
        ("q", "v", "proj", "fc1", "fc2"),
        images(2),
        [(6, 24, 24), (2, 24, 48), (2, 48, 24)],
    ),
    "torchvision": (torchvision_vit, ("fc1", "fc2"), images(2), [(2, 24, 48), (2, 48, 24)]),
    "an encoder of PyTorch": (
        net,
        ("linear1", "linear2", "embed"),
        random(3, 4, 7),
        [(1, 7, 24), (2, 24, 32), (2, 32, 24)],
    ),
    "a plain sequence": (mlp, ("0", "2.0"), random(3, 7), [(1, 7, 24), (1, 24, 24)]),
}
every_model = pytest.mark.parametrize(("make", "targets", "x", "shapes"), MODELS.values(), ids=MODELS.keys())


@every_model
def test_injection_changes_no_bit_and_then_every_projection_counts(
    make: Callable[[], nn.Module], targets: tuple[str, ...], x: Tensor, shapes: list[tuple[int, int, int]]
) -> None:
    model = make()
    before = output(model, x)
    assert hilora.inject(model, HiLoRAConfig(r=2, target_modules=targets)) is model
    assert torch.equal(output(model, x), before)
    assert sorted((len(b.names), b.in_features, b.out_features) for b in banks(model)) == sorted(shapes)
    assert not model.training
    for bank in banks(model):
        fresh = {tier: (bank.A(tier), bank.B(tier)) for tier in TIERS}
        for position in range(len(bank.names)):
            for tier, (A, B) in fresh.items():
                bank.assign(tier, A, B.index_fill(0, torch.tensor(position), 0.5))
            assert not torch.equal(output(model, x), before), f"{bank.names[position]} has no effect"
        for tier, (A, B) in fresh.items():
            bank.assign(tier, A, B)
    assert torch.equal(output(model, x), before)


@every_model
def test_adapters_act_alike_in_every_mode(
    make: Callable[[], nn.Module], targets: tuple[str, ...], x: Tensor, shapes: list[tuple[int, int, int]]
) -> None:
    """Also where a library takes another path without gradients, as nn.TransformerEncoderLayer does."""
    model = hilora.inject(make(), HiLoRAConfig(r=2, target_modules=targets))
    randomise(model)
    with torch.no_grad():
        frozen = output(model, x)
    y = model(x)
    torch.testing.assert_close(y if isinstance(y, Tensor) else y.logits, frozen)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_errors_leave_the_model_as_it_was() -> None:
    model = vit()
    model.blocks[1].mlp.fc1 = Scaled(24, 96)
    before = snapshot(model)
    for config, error, message in [
        (HiLoRAConfig(target_modules=("q", "nothing")), ValueError, "target 'nothing' finds no linear layer"),
        (HiLoRAConfig(target_modules=("q", "qkv")), ValueError, "are both targets"),
        (HiLoRAConfig(target_modules=("q", "fc1")), TypeError, "Scaled computes its output"),
    ]:
        with pytest.raises(error, match=message):
            hilora.inject(model, config)
        assert same(snapshot(model), before)
    hilora.inject(model, CONFIG)
    with pytest.raises(ValueError, match=r"has adapters already: take them out first, by hilora\.unload"):
        hilora.inject(model, CONFIG)
    with pytest.raises(ValueError, match=r"wrap it, hilora\.TieredLoRALinear\(linear"):
        hilora.inject(nn.Linear(3, 3), CONFIG)
    assert isinstance(hilora.inject(vit(), CONFIG).blocks[0].attn.qkv, TieredLoRALinear)  # type: ignore[union-attr, index]


def test_a_model_without_adapters_says_so() -> None:
    for function in (
        lambda model: hilora.set_active_tier(model, "root"),
        lambda model: hilora.set_slots(model, leaf=torch.tensor([0])),
        hilora.orthogonality_penalty,
        hilora.merge,
        hilora.unload,
        lambda model: hilora.save_adapters(model, "/nowhere/a.safetensors"),
    ):
        with pytest.raises(ValueError, match="VisionTransformer has no adapters: inject them first"):
            function(vit())


def test_a_layer_that_is_shared_stays_shared() -> None:
    model = net()
    assert isinstance(model, Net)
    hilora.inject(model, HiLoRAConfig(target_modules=("embed",)), example_input=random(1, 4, 7))
    assert model.embed is model.extra["embed"]
    assert isinstance(model.embed, TieredLoRALinear)


def test_dtype_of_the_adapters() -> None:
    for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = vit().to(dtype)
        x = images(2, dtype=dtype)
        before = output(model, x)
        hilora.inject(model, CONFIG)
        assert {value.dtype for value in values(model)} == {wide}
        assert torch.equal(output(model, x), before)
        assert output(model, x).dtype == dtype
        model(x).float().square().sum().backward()
        assert model.get_parameter("blocks.0.attn.qkv.lora_B.root").grad.dtype == wide


def test_adapters_of_a_meta_model_are_on_meta() -> None:
    with torch.device("meta"):
        model = vit()
    hilora.inject(model, CONFIG)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_adapters_are_drawn_from_the_global_stream() -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = vit()
        torch.manual_seed(seed)
        hilora.inject(model, CONFIG)
        drawn.append((values(model)[2], torch.rand(1)))
    assert same(drawn[0], drawn[1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


HEADS = {
    "timm": (vit, ["head.weight", "head.bias"]),
    "timm, distilled": (
        lambda: timm_model("deit_tiny_distilled_patch16_224", img_size=32, depth=1),
        ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
    ),
    "timm, no head": (lambda: vit(num_classes=0), []),
    "transformers": (transformers_vit, ["classifier.weight", "classifier.bias"]),
    "torchvision": (torchvision_vit, ["heads.head.weight", "heads.head.bias"]),
    "a user's": (net, ["head.weight", "head.bias"]),
    "none": (mlp, []),
}


@pytest.mark.parametrize(("make", "names"), HEADS.values(), ids=HEADS.keys())
def test_a_tier_and_the_head_train_and_nothing_else(make: Callable[[], nn.Module], names: list[str]) -> None:
    model = make()
    target = "0" if isinstance(model, nn.Sequential) else "linear1" if isinstance(model, Net) else "fc1"
    hilora.inject(model, HiLoRAConfig(target_modules=(target,)))
    assert list(head_parameters(model)) == names
    for tier in TIERS:
        hilora.set_active_tier(model, tier)
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        adapters = [name for name in trained if ".lora_" in name or name.startswith("0.lora_")]
        assert [name.rpartition(".")[2] for name in adapters] == [tier] * 2 * sum(len(b.layers) for b in banks(model))
        assert [name for name in trained if name not in adapters] == names
        assert [bank.active for bank in banks(model)] == [tier] * len(banks(model))
    with pytest.raises(ValueError, match="unknown tier 'lief'"):
        hilora.set_active_tier(model, "lief")
    assert banks(model)[0].active == "leaf", "an error changes nothing"


def test_an_adapted_head_is_no_head_that_trains() -> None:
    model = hilora.inject(vit(), HiLoRAConfig(r=2, target_modules=("fc1", "head")))
    assert head_parameters(model) == {}
    hilora.set_active_tier(model, "cluster")
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.requires_grad} == {"cluster"}


def test_training_changes_only_what_is_active() -> None:
    model = injected()
    for tier in TIERS:
        hilora.set_active_tier(model, tier)
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images(4)), torch.arange(4)).backward()
            optimiser.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert {name.partition(".qkv.")[2] or name for name in changed} == {
            f"lora_A.{tier}",
            f"lora_B.{tier}",
            "head.weight",
            "head.bias",
        }


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss."""
    model.zero_grad()
    nn.functional.cross_entropy(model(images(4)), torch.arange(4)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_models_can_be_copied_and_pickled_before_and_after_training() -> None:
    model = injected()
    hilora.set_slots(model, leaf=torch.tensor([1, 0]))
    for _ in range(2):
        others: list[VisionTransformer] = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        for other in others:
            assert same(output(other, images(4)), output(model, images(4)))
            assert same(trained(other), trained(model))
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            assert not own & {p.untyped_storage().data_ptr() for p in other.parameters()}
            last = other.get_submodule("blocks.1.attn.qkv")
            assert isinstance(last, TieredLoRALinear)
            assert banks(other)[0].layers[1] is last
        trained(model)


def test_a_state_dict_fits_the_same_model() -> None:
    model, other = injected(), injected(seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(output(other, images(2)), output(model, images(2)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same(backend: str) -> None:
    torch._dynamo.reset()
    model = injected(depth=1).double()
    hilora.set_slots(model, leaf=torch.tensor([1, 0]))
    randomise(model, seed=2)
    x = images(4, dtype=torch.float64)
    expected, gradients = output(model, x), None
    steps: list[Any] = [copy.deepcopy(model), torch.compile(model, backend=backend)]
    for step in steps:
        model.zero_grad()
        y = step(x)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        y.square().sum().backward()
        found = [p.grad for name, p in step.named_parameters() if ".lora_" in name and p.grad is not None]
        assert len(found) == 2
        for got, want in zip(found, gradients or found, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        gradients = found
    torch._dynamo.reset()


def test_a_plain_module_can_be_compiled_before_its_first_forward_pass() -> None:
    torch._dynamo.reset()
    model = hilora.inject(mlp(), HiLoRAConfig(r=2, target_modules=("0",)))
    randomise(model)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(compiled(random(3, 7)), model(random(3, 7)))
    assert not model._forward_hooks
    torch._dynamo.reset()


def test_the_library_needs_only_torch_numpy_and_safetensors() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import hilora, hilora.aggregation, hilora.clustering
heavy = {"timm", "sklearn", "scipy", "matplotlib", "triton", "transformers", "torchvision", "PIL"}
print(sorted({name.split(".")[0] for name in set(sys.modules) - before} & heavy))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
