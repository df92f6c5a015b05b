"""Adapted models in the hands of tools that look for parameters where they act."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, load_model, save_file, save_model
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import fully_shard
from torch.nn.utils.parametrize import register_parametrization
from torch.optim.swa_utils import AveragedModel
from torchvision.models.feature_extraction import create_feature_extractor

import hilora
from hilora import HiLoRAConfig, HiLoRAError, TieredLoRALinear
from hilora.adapters.injection import banks
from hilora.kernels import use_backend
from tests.helpers import TIERS, compiled, gradients, images, injected, output, randomise, same, values, vit
from tests.vits import timm_model


def deep(depth: int = 3) -> VisionTransformer:
    """A ViT with adapters of both kinds of layers, several blocks deep."""
    return injected(HiLoRAConfig(r=2, target_modules=("q", "v", "fc1")), depth=depth)


def test_parameters_are_called_after_the_layer_they_act_in() -> None:
    names = [name for name, _ in deep(1).named_parameters() if "lora" in name]
    layers = ("blocks.0.attn.qkv", "blocks.0.mlp.fc1")
    assert names == [f"{layer}.lora_{factor}.{tier}" for layer in layers for factor in "AB" for tier in TIERS]
    shapes = {name: tuple(p.shape) for name, p in deep(1).named_parameters()}
    assert shapes["blocks.0.attn.qkv.lora_A.leaf"] == (2, 2, 24)
    assert shapes["blocks.0.mlp.fc1.lora_B.leaf"] == (96, 2)


def test_filters_by_name_find_a_block_s_adapters() -> None:
    model = deep()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.2.") and ".lora_" in name and name.endswith(".root"))
    model(images(2)).square().sum().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"blocks.2.{at}.lora_{f}.root" for at in ("attn.qkv", "mlp.fc1") for f in "AB"}


def test_layer_decay_gives_each_block_a_rate_of_its_own() -> None:
    model = deep()
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1.0, layer_decay=0.5)
    rates = {
        id(p): group["lr"] * group.get("lr_scale", 1.0) for group in optimiser.param_groups for p in group["params"]
    }
    found = [rates[id(model.get_parameter(f"blocks.{i}.attn.qkv.lora_A.root"))] for i in range(3)]
    assert found == [pytest.approx(0.5 ** (3 - i)) for i in range(3)]


def test_any_block_can_be_pruned() -> None:
    model = deep()
    kept = values(model)
    del model.blocks[0]
    hilora.set_active_tier(model, "leaf")
    hilora.set_slots(model, leaf=torch.tensor([0, 1]))
    y = model(images(4))
    (y.square().sum() + hilora.orthogonality_penalty(model)).backward()
    assert banks(model)[0].names == tuple(f"blocks.{i}.attn.{part}" for i in (0, 1) for part in "qv")
    assert torch.equal(values(model)[0], kept[0][2:])
    assert all(layer.lora_B["leaf"].grad is not None for bank in banks(model) for layer in bank.layers)


def test_a_pruned_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model = deep()
    del model.blocks[0]
    hilora.save_adapters(model, tmp_path / "a.safetensors")
    plain = vit(depth=3)
    del plain.blocks[0]
    hilora.load_adapters(plain, tmp_path / "a.safetensors")
    assert torch.equal(output(plain, images(2)), output(model, images(2)))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_a_copied_block_is_a_model_of_its_own(way: str) -> None:
    model = deep()
    block = model.blocks[1]
    other = copy.deepcopy(block) if way == "deepcopy" else pickle.loads(pickle.dumps(block))
    x = torch.randn(2, 5, 24)
    assert torch.equal(other(x), block(x))
    assert [bank.names for bank in banks(other)] == [("attn.q", "attn.v"), ("mlp.fc1",)]
    before = output(model, images(2))
    randomise(other, seed=9)
    hilora.set_slots(other, leaf=torch.tensor([1, 0]))
    assert torch.equal(output(model, images(2)), before)
    assert not torch.equal(other(x), block(x))
    everything = sum(p.numel() for p in other.parameters())
    assert everything < sum(p.numel() for p in model.parameters()) / 2, "no other block comes along"


def test_moving_keeps_values_and_moments_fit() -> None:
    model = deep()
    before = values(model)
    expected = output(model, images(2)).double()
    model.double()
    assert {value.dtype for value in values(model)} == {torch.float64}
    assert same([value.float() for value in values(model)], before)
    torch.testing.assert_close(output(model, images(2).double()), expected, rtol=1e-5, atol=1e-5)
    model.to("meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_gradients_and_penalty_of_moved_parameters_are_the_same() -> None:
    found = []
    for move in (lambda model: model, copy.deepcopy, lambda model: model.double().float()):
        model = move(deep())
        hilora.set_active_tier(model, "leaf")
        (model(images(4)).square().sum() + hilora.orthogonality_penalty(model)).backward()
        found.append(gradients(model))
    assert same(found[0], found[1])
    assert same(found[0], found[2])


def test_checkpointing_gives_the_same_gradients() -> None:
    wanted: list[Tensor] = []
    for checkpointing in (False, True):
        model = deep()
        hilora.set_slots(model, leaf=torch.tensor([1, 0]))
        randomise(model, seed=2)
        hilora.set_active_tier(model, "leaf")
        model.set_grad_checkpointing(checkpointing)
        model.train()
        model(images(4)).square().sum().backward()
        wanted = wanted or gradients(model)
        assert any(gradient.any() for gradient in wanted)
        assert same(gradients(model), wanted)


def test_a_state_dict_is_a_file(tmp_path: Path) -> None:
    model, other = deep(), vit(seed=3, depth=3)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    hilora.inject(other, banks(model)[0].config)
    other.load_state_dict(load_file(tmp_path / "m.safetensors"))
    assert torch.equal(output(other, images(2)), output(model, images(2)))
    torch.save(model, tmp_path / "m.pt")
    again = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(output(again, images(2)), output(model, images(2)))


def test_tools_that_drop_shared_tensors_write_every_adapter(tmp_path: Path) -> None:
    model, other = deep(), deep()
    save_model(model, str(tmp_path / "m.safetensors"))
    randomise(other, seed=4)
    load_model(other, str(tmp_path / "m.safetensors"))
    assert same(values(other), values(model))
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    hilora.set_active_tier(model, "leaf")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    prepared, optimiser = accelerator.prepare(model, optimiser)
    accelerator.backward(prepared(images(2)).sum())
    optimiser.step()
    trained = values(model)
    accelerator.save_state(str(tmp_path / "state"))
    accelerator.save_model(prepared, str(tmp_path / "model"))
    assert set(load_file(tmp_path / "model" / "model.safetensors")) == set(model.state_dict())
    randomise(model, seed=5)
    accelerator.load_state(str(tmp_path / "state"))
    assert same(values(model), trained)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": compiled,
    "checkpoint_wrapper": checkpoint_wrapper,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "ModelEmaV2": ModelEmaV2,
    "ModelEmaV3": ModelEmaV3,
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_files_have_nothing_of_wrappers(wrap: Callable[[nn.Module], nn.Module], inside: bool, tmp_path: Path) -> None:
    model, x = nn.Sequential(vit(), nn.Identity()), images(2)
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("q", "fc1")))
    randomise(model)
    hilora.save_adapters(model, tmp_path / "plain")
    hilora.export_peft(model, tmp_path / "plain_peft")
    if inside:
        wrapped: Any = nn.Sequential(wrap(vit()), nn.Identity())
    else:
        wrapped = wrap(nn.Sequential(vit(), nn.Identity()))
    hilora.load_adapters(wrapped, tmp_path / "plain")
    if not (inside and wrap in (ModelEmaV2, ModelEmaV3)):  # which cannot be called inside of a model
        assert torch.equal(output(wrapped, x), output(model, x))
    hilora.save_adapters(wrapped, tmp_path / "wrapped")
    hilora.export_peft(wrapped, tmp_path / "wrapped_peft")
    assert (tmp_path / "wrapped").read_bytes() == (tmp_path / "plain").read_bytes()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "wrapped_peft" / name).read_bytes() == (tmp_path / "plain_peft" / name).read_bytes()


def test_averaging_of_weights_sees_the_adapters() -> None:
    model = deep()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    first = values(model)
    randomise(model, seed=4)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    expected = [(a + b) / 2 for a, b in zip(values(model), values(model), strict=True)]
    assert first
    for got, want in zip(values(averaged.module), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_blocks_can_be_sharded(one_process: None) -> None:
    found = []
    for sharded in (False, True):
        model = deep(2)
        hilora.set_active_tier(model, "leaf")
        if sharded:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            for block in model.blocks:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        y = model(images(2))
        penalty = hilora.orthogonality_penalty(model)
        (y.square().sum() + penalty).backward()
        grads: list[Any] = [p.grad for name, p in model.named_parameters() if name.endswith((".leaf", "head.weight"))]
        whole = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
        found.append([y.detach(), *whole])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_ddp_must_be_made_for_the_tier_that_trains(one_process: None) -> None:
    with pytest.raises(HiLoRAError, match="inject them first, then wrap"):
        hilora.inject(nn.parallel.DistributedDataParallel(vit()), HiLoRAConfig())
    model = deep(1)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with pytest.raises(HiLoRAError, match=r"hilora.set_active_tier\(model.module, 'leaf'\), then wrap that anew"):
        hilora.set_active_tier(wrapped, "leaf")
    assert banks(wrapped)[0].active == "root", "an error changes nothing"
    wrapped(images(2)).sum().backward()
    hilora.set_active_tier(model, "leaf")
    with pytest.raises(HiLoRAError, match=r"does not synchronise the gradients of blocks\.0.*lora_A\.leaf and 3 more"):
        wrapped(images(2))
    with torch.no_grad():
        wrapped(images(2))
    again = nn.parallel.DistributedDataParallel(model)
    again(images(2)).sum().backward()
    assert any(grad.any() for grad in gradients(model))


def test_adapters_of_sharded_blocks_are_saved_and_loaded(one_process: None, tmp_path: Path) -> None:
    model = deep(2)
    with torch.no_grad():
        model.head.bias.add_(1)
    hilora.save_adapters(model, tmp_path / "whole")
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)
    hilora.save_adapters(model, tmp_path / "sharded")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "sharded").read_bytes()
    expected = [value.detach().clone() for value in values(model)]
    randomise(model, seed=7)
    assert not same(values(model), expected)
    hilora.load_adapters(model, tmp_path / "whole")
    assert same(values(model), expected)


@pytest.mark.parametrize("what", ["load_adapters", "set_slots", "inject", "merge"])
def test_what_is_done_in_inference_mode_can_be_trained_afterwards(what: str, tmp_path: Path) -> None:
    hilora.save_adapters(deep(1), tmp_path / "a")
    model = vit(depth=1) if what == "inject" else deep(1)
    with torch.inference_mode():
        if what == "load_adapters":
            hilora.load_adapters(model, tmp_path / "a")
        elif what == "set_slots":
            hilora.set_slots(model, leaf=torch.tensor([0, 1]))
        elif what == "inject":
            hilora.inject(model, HiLoRAConfig(r=2))
        else:
            hilora.unmerge(hilora.merge(model))
        model(images(2))
    for tier in TIERS:
        hilora.set_active_tier(model, tier)
        model(images(2)).square().sum().backward()
    assert any(gradient.any() for gradient in gradients(model))


def test_stochastic_depth_and_accumulated_steps_train() -> None:
    """A block that is skipped has no gradient; two backward passes before a step are one of both batches."""
    model = hilora.inject(
        timm_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=24, num_heads=2, drop_path_rate=0.5),
        HiLoRAConfig(r=2),
    )
    randomise(model)
    hilora.set_slots(model, leaf=torch.tensor([1, 0]))
    randomise(model)
    model.train()
    torch.manual_seed(0)
    drawn = torch.stack([model(images(4, 32)) for _ in range(8)])
    assert not torch.allclose(drawn[:-1], drawn[1:])
    drawn.square().sum().backward()
    assert all(grad.isfinite().all() for grad in gradients(model))
    model.eval()
    model.zero_grad()
    x = images(4, 32)
    model(x).square().sum().backward()
    once = gradients(model)
    model(x).square().sum().backward()
    for got, want in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(got, 2 * want)


def test_the_fast_path_of_an_encoder_does_not_skip_the_adapters() -> None:
    layer = nn.TransformerEncoderLayer(24, 2, 32, batch_first=True).eval()
    model = nn.Sequential(layer)
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("linear1",)))
    assert isinstance(layer.linear1, TieredLoRALinear)
    randomise(model)
    x = torch.randn(2, 3, 24)
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, model(x).detach())


def test_second_derivatives_of_a_model() -> None:
    model = deep(1)
    for block in model.blocks:
        block.attn.fused_attn = False
    found = []
    for backend in ("folded", "reference"):
        x = images(40).requires_grad_()
        with use_backend(backend):
            y = model(x)
        (slope,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        model.zero_grad()
        slope.square().sum().backward()
        found.append([x.grad, *gradients(model)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


class Twice(nn.Module):
    """A parametrisation."""

    def forward(self, value: Tensor) -> Tensor:
        return 2 * value

    def right_inverse(self, value: Tensor) -> Tensor:
        return value / 2


@pytest.mark.parametrize("way", ["before injection", "after injection", "weight_norm"])
def test_a_layer_whose_weight_is_computed_is_adapted_and_merged(way: str) -> None:
    model, x = vit(), images(4)
    layer = model.blocks[0].attn.qkv
    if way == "before injection":
        register_parametrization(layer, "weight", Twice())
    elif way == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)
    keys, plain = list(model.state_dict()), output(model, x)
    hilora.inject(model, HiLoRAConfig(r=2))
    assert torch.equal(output(model, x), plain)
    if way == "after injection":
        register_parametrization(model.blocks[0].attn.qkv, "weight", Twice())
        assert torch.equal(output(model, x), plain)
    assert not any(p.requires_grad for name, p in model.named_parameters() if "parametrizations" in name)
    randomise(model)
    adapted = output(model, x)
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), adapted, rtol=1e-4, atol=1e-4)
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    hilora.unmerge(model)
    assert torch.equal(output(model, x), adapted)
    hilora.unload(model)
    assert torch.equal(output(model, x), plain)
    if way != "after injection":
        assert list(model.state_dict()) == keys
        with torch.no_grad():
            next(model.get_submodule("blocks.0.attn.qkv.parametrizations.weight").parameters()).mul_(2)
        assert not torch.equal(output(model, x), plain), "it still computes its weight"


def test_offloaded_adapters_act_and_say_so_where_they_are_not_there() -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = deep(2), images(4)
    expected = output(model, x)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.blocks[0].attn.qkv.lora_A._parameters["root"].is_meta
    assert torch.equal(output(model, x), expected)
    for call in (hilora.merge, hilora.orthogonality_penalty, lambda model: hilora.get_adapters(model, "leaf")):
        with pytest.raises(HiLoRAError, match=r"are offloaded by accelerate.*remove_hook_from_module"):
            call(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert torch.equal(output(model, x), expected)
    hilora.merge(model)


@pytest.mark.parametrize("way", ["dispatched", "offloaded", "on the disk"])
def test_a_model_that_accelerate_spread_out_is_adapted(way: str, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x, cpu = vit(), images(4), torch.device("cpu")
    hilora.save_adapters(injected(), tmp_path / "a")
    if way == "dispatched":
        accelerate.dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    elif way == "offloaded":
        accelerate.cpu_offload(model, execution_device=cpu)
    else:
        accelerate.disk_offload(model, str(tmp_path / "weights"), execution_device=cpu)
    hilora.load_adapters(model, tmp_path / "a")
    assert torch.equal(output(model, x), output(injected(), x))
    hilora.set_active_tier(model, "leaf")
    (model(x).sum() + hilora.orthogonality_penalty(model)).backward()
    assert any(gradient.any() for gradient in gradients(model))
    model.zero_grad()
    hilora.save_adapters(model, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes(), "of the same base"
    if way != "dispatched":
        with pytest.raises(HiLoRAError, match=r"the weights are offloaded by accelerate.*remove_hook_from_module"):
            hilora.merge(model)
        with pytest.raises(HiLoRAError, match="adapters of other frozen weights"):
            hilora.load_adapters(offloaded(vit(seed=1)), tmp_path / "a")
        with torch.no_grad():
            (trained := injected()).head.bias.add_(1)
        hilora.save_adapters(trained, tmp_path / "c")
        with pytest.raises(HiLoRAError, match="accelerate offloaded that of the model: load the file before"):
            hilora.load_adapters(model, tmp_path / "c")
    hilora.unload(model)
    assert torch.equal(output(model, x), output(vit(), x)), "and it is still spread out"
    hilora.load_adapters(model, tmp_path / "a")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    hilora.merge(model)
    torch.testing.assert_close(output(model, x), output(injected(), x), rtol=1e-4, atol=1e-4)


def offloaded(model: nn.Module) -> nn.Module:
    found = pytest.importorskip("accelerate").cpu_offload(model, execution_device=torch.device("cpu"))
    assert isinstance(found, nn.Module)
    return found


def test_a_checkpoint_of_the_plain_model_is_loaded_strictly() -> None:
    model, plain, x = deep(2), vit(seed=9), images(2)
    adapters = values(model)
    for target in (model, nn.DataParallel(model), compiled(model)):
        prefix = next(iter(target.state_dict())).removesuffix("cls_token")
        target.load_state_dict({prefix + name: value for name, value in plain.state_dict().items()})
        assert torch.equal(model.head.weight, plain.head.weight)
    assert same(values(model), adapters)
    with hilora.disable_adapters(model):
        assert torch.equal(output(model, x), output(plain, x))
    some = {name: value for name, value in model.state_dict().items() if "blocks.1.attn.qkv.lora_A.leaf" not in name}
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "blocks.1.attn.qkv.lora_A.leaf". $'):
        model.load_state_dict(some)
    del some["blocks.0.mlp.fc1.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({name: value for name, value in some.items() if ".lora_" not in name})
    hilora.unload(model)
    assert not model._load_state_dict_post_hooks


@pytest.mark.parametrize("layer", [False, True])
def test_scripting_says_what_to_do_instead(layer: bool) -> None:
    model: nn.Module = TieredLoRALinear(nn.Linear(3, 3)) if layer else deep(1)
    with pytest.raises(HiLoRAError, match=r"hilora.merge\(model\) first, or .*torch.jit.trace or torch.export"):
        torch.jit.script(model)
    if not layer:
        expected = output(model, images(2))
        scripted = torch.jit.script(hilora.merge(model))
        torch.testing.assert_close(output(scripted, images(2)), expected, rtol=1e-4, atol=1e-4)


def test_a_layer_is_one_node_of_a_graph_of_torch_fx() -> None:
    model, x = deep(2), images(2)
    traced = create_feature_extractor(model, ["blocks.0", "head"])
    torch.testing.assert_close(traced(x)["head"], model(x))
    nodes = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert "blocks.0.attn.qkv" in nodes
    randomise(model, seed=5)
    torch.testing.assert_close(traced(x)["head"], model(x), msg="it is the model's own layer")


@pytest.mark.parametrize("clients", [1, 2])
def test_an_exported_program_takes_any_batch(clients: int) -> None:
    model = deep(2)
    if clients > 1:
        hilora.set_slots(model, leaf=torch.arange(clients))
        randomise(model)
    batch = torch.export.Dim("batch", min=2, max=32)
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch * clients},)).module()
    for count in (4, 30):
        torch.testing.assert_close(program(images(count)), model(images(count)), rtol=1e-4, atol=1e-4)


def test_a_trace_of_many_rows_can_be_saved(tmp_path: Path) -> None:
    model, x = deep(1), images(40)
    with torch.no_grad():
        torch.jit.save(torch.jit.trace(model, x), tmp_path / "traced.pt")
        torch.testing.assert_close(torch.jit.load(tmp_path / "traced.pt")(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False])
def test_a_file_of_onnx_computes_the_same(dynamo: bool, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = deep(1), images(40)
    with torch.no_grad():
        torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=dynamo, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), output(model, x), rtol=1e-4, atol=1e-4)
