from __future__ import annotations

import copy
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hilora
from hilora import HiLoRAConfig
from hilora.adapters.injection import banks
from hilora.adapters.io.files import checksum, read_tensors, write_tensors
from hilora.errors import FileError
from tests.helpers import CONFIG, TIERS, images, injected, random, randomise, same, snapshot, values, vit

SEVERAL = HiLoRAConfig(
    r={"a": 3, "b": 2},
    lora_alpha={"a": 1, "b": 0.5},
    target_modules=("q", "fc1"),
    tiers=("a", "b"),
    slots={"a": 0, "b": 4},
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "adapters.safetensors"


@pytest.mark.parametrize("config", [CONFIG, SEVERAL, HiLoRAConfig(target_modules=("qkv", "proj"), lora_dropout=0.1)])
@pytest.mark.parametrize("plain", [True, False], ids=["into a plain model", "into an injected model"])
def test_adapters_come_back(config: HiLoRAConfig, plain: bool, path: Path) -> None:
    model = injected(config)
    hilora.save_adapters(model, path)
    other = vit() if plain else hilora.inject(vit(), config)
    assert hilora.load_adapters(other, path) is other
    assert same(values(other), values(model))
    assert [bank.names for bank in banks(other)] == [bank.names for bank in banks(model)]
    assert banks(other)[0].config == config
    if config is not SEVERAL:
        assert torch.equal(other(images(2)), model(images(2)))


def test_loading_resizes_tables_and_keeps_what_is_active(path: Path) -> None:
    model = injected()
    hilora.set_slots(model, leaf=torch.tensor([7]))
    randomise(model, seed=2)
    hilora.save_adapters(model, path)
    other = injected(seed=3)
    other.load_state_dict(vit().state_dict(), strict=False)
    hilora.set_active_tier(other, "cluster")
    parameters = [id(parameter) for parameter in other.parameters()]
    hilora.load_adapters(other, path)
    assert same(values(other), values(model))
    assert banks(other)[0].active == "cluster"
    assert [id(parameter) for parameter in other.parameters()] == parameters
    with pytest.raises(ValueError, match="tier 'leaf' has 8 adapters"):
        other(images(2))
    hilora.set_slots(other, leaf=torch.tensor([7]))
    assert same(other(images(2)), model(images(2)))


def test_the_dtype_of_the_model_is_kept(path: Path) -> None:
    model = injected()
    hilora.save_adapters(model, path)
    other = hilora.load_adapters(vit().double(), path)
    assert {parameter.dtype for parameter in other.parameters()} == {torch.float64}
    torch.testing.assert_close(other(images(2).double()), model(images(2)).double(), rtol=1e-5, atol=1e-5)


def test_the_head_is_saved_only_if_it_was_trained(path: Path) -> None:
    model = injected()
    hilora.save_adapters(model, path)
    assert not [name for name in load_file(path) if name.startswith("head.")]
    with torch.no_grad():
        model.head.bias += 1
    hilora.save_adapters(model, path)
    assert [name for name in load_file(path) if name.startswith("head.")] == ["head.head.bias", "head.head.weight"]
    other = hilora.load_adapters(vit(seed=4), path, check_base=False)
    assert torch.equal(other.head.weight, model.head.weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(other.head.bias, model.head.bias)  # type: ignore[union-attr, arg-type]
    hilora.save_adapters(other, path)
    assert [name for name in load_file(path) if name.startswith("head.")], "it was trained before it was loaded"


def test_a_file_without_a_head_leaves_the_model_s_own(path: Path) -> None:
    hilora.save_adapters(injected(), path)
    other = vit(seed=4)
    head = other.head.weight.detach().clone()
    hilora.load_adapters(other, path, check_base=False)
    assert torch.equal(other.head.weight, head)


def test_the_file_says_what_it_holds(path: Path) -> None:
    hilora.save_adapters(injected(SEVERAL), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "hilora-1"
    described = json.loads(metadata["hilora"])
    assert HiLoRAConfig.from_dict(described["config"]) == SEVERAL
    assert described["projections"] == [
        ["blocks.0.attn.q", "blocks.1.attn.q"],
        ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"],
    ]
    shapes = {name: tuple(value.shape) for name, value in load_file(path).items()}
    assert shapes["1.b.lora_A"] == (2, 4, 2, 24)
    assert shapes["1.b.lora_B"] == (2, 4, 96, 2)
    assert shapes["0.a.lora_A"] == (2, 0, 3, 24)


class Layers(nn.Module):
    """Two layers that a user wrapped by hand, each with a config of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.one = hilora.TieredLoRALinear(nn.Linear(7, 24), r=2)
        self.two = hilora.TieredLoRALinear(nn.Linear(24, 5), r=3, lora_alpha=1, tiers=("shared", "own"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x))  # type: ignore[no-any-return]


def test_single_layers_come_back(path: Path) -> None:
    model, other = Layers(), Layers()
    randomise(model)
    hilora.save_adapters(model, path)
    hilora.load_adapters(other, path, check_base=False)
    assert same(values(other), values(model))
    plain = nn.Sequential(nn.Linear(7, 24))
    with pytest.raises(ValueError, match=r"is of single layers: wrap these in hilora\.TieredLoRALinear, then load it"):
        hilora.load_adapters(plain, path)
    other.two = hilora.TieredLoRALinear(nn.Linear(24, 5), r=2, lora_alpha=1, tiers=("shared", "own"))
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"has tiers \(rank, scale\) \{'shared': \(3, .*the model \{'shared': \(2, "):
        hilora.load_adapters(other, path)
    assert same(snapshot(other), before)


def test_folders_are_made_and_nothing_else(tmp_path: Path) -> None:
    hilora.save_adapters(injected(), tmp_path / "new" / "folder" / "a.safetensors")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "folder", "a.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_saved(value: float, path: Path) -> None:
    model = injected()
    hilora.save_adapters(model, path)
    before = path.read_bytes()
    with torch.no_grad():
        banks(model)[0].layers[0].lora_B["cluster"][1, 3, 1] = value
    with pytest.raises(ValueError, match=r"0.cluster.lora_B is not finite: nothing is saved to .*adapters.safetensors"):
        hilora.save_adapters(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_a_failed_write_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = injected()
    hilora.save_adapters(model, path)
    before = path.read_bytes()

    def fail(half: Path, data: bytes) -> None:
        half.open("wb").write(data[:4])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        hilora.save_adapters(model, path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])


def garble(path: Path) -> None:
    path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def pickled(path: Path) -> None:
    torch.save({"format": "hilora-1"}, path)


def foreign(path: Path) -> None:
    save_file({"lora_A": torch.zeros(2, 2)}, path, {"format": "pt"})


def without_metadata(path: Path) -> None:
    save_file({"lora_A": torch.zeros(2, 2)}, path)


def rewrite(change: Callable[[dict[str, torch.Tensor], dict[str, str]], object]) -> Callable[[Path], None]:
    """Change the tensors and the metadata of a file, with a checksum that agrees."""

    def break_(path: Path) -> None:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        tensors = load_file(path)
        change(tensors, metadata)
        if "checksum" in metadata:
            metadata["checksum"] = checksum(metadata.get("hilora", ""), tensors)
        save_file(tensors, path, metadata)

    return break_


def described(**fields: object) -> Callable[[Path], None]:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        metadata["hilora"] = json.dumps({**json.loads(metadata["hilora"]), **fields})

    return rewrite(change)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (cut, "cannot be read"),
    "a truncated header": (cut_header, "cannot be read"),
    "a garbled header": (garble, "cannot be read"),
    "empty": (empty, "cannot be read"),
    "a pickle": (pickled, "cannot be read"),
    "of another library": (foreign, r"is no file of hilora's: its format is 'pt', not 'hilora-1'"),
    "without metadata": (without_metadata, "its format is None"),
    "no description": (rewrite(lambda t, m: m.pop("hilora")), "cannot be read"),
    "a description that is no JSON": (rewrite(lambda t, m: m.update(hilora="{")), "cannot be read"),
    "a description that is a list": (rewrite(lambda t, m: m.update(hilora="[]")), "its description is list"),
    "no config": (
        rewrite(lambda t, m: m.update(hilora='{"projections": []}')),
        "does not describe adapters: .*'config'",
    ),
    "a config that is none": (described(config=3), "does not describe adapters"),
    "a config of a newer version": (described(config={"r": 8, "gate": 1}), r"unknown fields \['gate'\]"),
    "a config out of range": (described(config={"r": 0}), "r must be a whole number"),
    "projections that are none": (described(projections=[3]), "does not describe adapters"),
    "no projections": (described(projections=[]), "does not describe adapters: 0 configs for 0 banks"),
    "too many configs": (
        described(configs=[CONFIG.to_dict()] * 2),
        "does not describe adapters: 2 configs for 1 banks",
    ),
    "other projections": (
        described(projections=[["blocks.0.attn.q"]]),
        r"adapts other projections than the model: blocks.0",
    ),
    "another rank": (
        described(config={**CONFIG.to_dict(), "r": 5}),
        r"do not fit tier 'root'|has tiers \(rank, scale\)",
    ),
    "a tier is missing": (
        rewrite(lambda t, m: t.pop("0.leaf.lora_B")),
        "lacks the adapters of tier 'leaf'",
    ),
    "another shape": (
        rewrite(lambda t, m: t.update({"0.leaf.lora_A": torch.zeros(4, 1, 1, 23)})),
        "do not fit tier 'leaf'",
    ),
    "not finite": (
        rewrite(lambda t, m: t["0.root.lora_A"].fill_(torch.nan)),
        "0.root.lora_A is not finite",
    ),
    "another head": (
        rewrite(lambda t, m: t.update({"head.head.weight": torch.zeros(9, 24)})),
        "has a head .*the model",
    ),
}


@pytest.mark.parametrize("plain", [True, False], ids=["plain model", "injected model"])
@pytest.mark.parametrize(("break_", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_not_right_is_an_error_and_changes_nothing(
    break_: Callable[[Path], object], message: str, plain: bool, path: Path
) -> None:
    saved = injected()
    with torch.no_grad():
        saved.head.bias += 1
    hilora.save_adapters(saved, path)
    break_(path)
    model = vit() if plain else injected(seed=5)
    model.blocks[0].train()
    model.cls_token.requires_grad_(plain)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hilora.load_adapters(model, path)
    assert same(snapshot(model), before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.safetensors", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"there is no file of adapters at {path}"):
            hilora.load_adapters(vit(), path)


def test_a_model_that_differs_is_refused(path: Path) -> None:
    hilora.save_adapters(injected(), path)
    cases = [
        (
            vit(depth=3),
            r"adapts other projections than the model: blocks.0.attn.q, blocks.0.attn.v… \(4\), not .* \(6\)",
        ),
        (vit(embed_dim=48), "do not fit tier 'root': expected"),
        (injected(HiLoRAConfig(r=4)), r"has tiers \(rank, scale\) \{'root': \(3, 2.0\)"),
        (injected(HiLoRAConfig(r=2, tiers=("root",))), r"the model \{'root': \(2, 8.0\)\}"),
        (injected(HiLoRAConfig(r=2, target_modules=("fc1",))), "adapts other projections"),
        (nn.Sequential(nn.Linear(3, 3)), "target 'q' finds no linear layer"),
        (hilora.merge(injected()), r"merged into the weights: take them out first, by hilora\.unmerge"),
    ]
    for model, message in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            hilora.load_adapters(model, path)
        assert same(snapshot(model), before)


@pytest.mark.parametrize(
    ("targets", "message"), [(["q"], "other projections"), (["nothing"], "target 'nothing' finds no linear layer")]
)
def test_targets_that_do_not_make_the_projections_are_refused(targets: list[str], message: str, path: Path) -> None:
    hilora.save_adapters(injected(), path)
    described(config={**CONFIG.to_dict(), "target_modules": targets})(path)
    model = vit()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        hilora.load_adapters(model, path)
    assert same(snapshot(model), before)


def test_slots_that_the_file_lacks_are_an_error(path: Path) -> None:
    hilora.save_adapters(injected(), path)
    model = injected()
    hilora.set_slots(model, leaf=torch.tensor([0, 2]))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"slots use adapter 2 of tier 'leaf', .* has 1: choose others by hilora.set_slots"
    ):
        hilora.load_adapters(model, path)
    assert same(dict(model.state_dict()), dict(before))
    hilora.set_slots(model, leaf=None)
    hilora.load_adapters(model, path)


def test_tensors_and_their_description_come_back(path: Path) -> None:
    tensors = {"a": random(3, 2), "b": torch.arange(4), "c": random(2, 4).T.bfloat16(), "d": torch.empty(0, 3)}
    write_tensors(path, tensors, {"classes": ["x", "y"], "n": 3})
    back, about = read_tensors(path)
    assert {name: back[name] for name in tensors}.keys() == back.keys()
    assert all(same(back[name], value.contiguous()) for name, value in tensors.items())
    assert about == {"classes": ["x", "y"], "n": 3}


def test_a_file_of_the_first_layout_still_loads() -> None:
    """Written when the adapters lay in a bank, by a model with 3 leaf adapters and a trained head."""
    old = Path(__file__).parent / "old" / "hilora-1.safetensors"
    model = hilora.load_adapters(vit(), old)
    assert {tier: banks(model)[0].slot_count(tier) for tier in TIERS} == {"root": 1, "cluster": 1, "leaf": 3}
    hilora.set_slots(model, leaf=torch.tensor([2, 0]))
    expected = [[0.8468, 0.8502, 1.0691, 0.9400, 0.9605], [0.8268, 1.0212, 1.0443, 0.8150, 0.8070]]
    torch.testing.assert_close(model(images(2)).detach(), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    for index, factor in enumerate(("lora_A", "lora_B")):
        assert torch.equal(load_file(old)[f"0.leaf.{factor}"], values(model)[2 + 3 * index])


def test_the_same_adapters_give_the_same_bytes(path: Path) -> None:
    model, other = injected(), path.with_name("other.safetensors")
    hilora.save_adapters(model, path)
    code = f"""
import hilora, torch
from tests.helpers import injected
hilora.save_adapters(injected(), {str(other)!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
    assert path.read_bytes() == other.read_bytes()
    reloaded = hilora.load_adapters(vit(), path)
    hilora.save_adapters(reloaded, other)
    assert path.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("plain", [True, False], ids=["plain model", "injected model"])
def test_adapters_know_their_base(plain: bool, path: Path) -> None:
    hilora.save_adapters(injected(), path)
    model: nn.Module = vit(seed=7) if plain else hilora.inject(vit(seed=7), CONFIG)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"of other frozen weights: of VisionTransformer .*check_base=False") as raised:
        hilora.load_adapters(model, path)
    assert isinstance(raised.value, hilora.HiLoRAError)
    assert same(snapshot(model), before)
    hilora.load_adapters(model, path, check_base=False)


def test_the_base_is_the_same_after_training_casting_and_merging(path: Path) -> None:
    model = injected()
    with torch.no_grad():
        model.head.weight += 1
    hilora.save_adapters(model, path)
    for change in (lambda m: m, lambda m: m.bfloat16(), lambda m: m.double(), lambda m: m.half()):
        hilora.load_adapters(change(vit()), path)
    expected = path.read_bytes()
    hilora.save_adapters(hilora.merge(model), path)
    assert path.read_bytes() == expected, "what is merged is saved as if it were not"


def test_other_sizes_of_the_same_backbone_have_other_heads_but_one_base(path: Path) -> None:
    hilora.save_adapters(injected(), path)
    torch.manual_seed(0)
    backbone = vit()
    backbone.reset_classifier(9)
    hilora.load_adapters(backbone, path)


@pytest.mark.parametrize(
    ("name", "message"), [("out/", "is a folder"), ("", "is a folder"), ("file/a", "is no folder")]
)
def test_a_path_that_cannot_be_a_file_is_an_error_and_leaves_nothing(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for model in (injected(),):
        with pytest.raises(hilora.HiLoRAError, match=message):
            hilora.save_adapters(model, f"{tmp_path}/{name}")
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_a_failed_write_leaves_no_new_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(half: Path, data: bytes) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        hilora.save_adapters(injected(), tmp_path / "new" / "folder" / "a.safetensors")
    assert not list(tmp_path.rglob("*"))


def test_ranks_that_a_file_cannot_have_are_an_error(path: Path) -> None:
    for ranks in ([{"leaf": [1, 1]}], [{"leaf": [2]}], [{"leaf": "x"}], [], 3, [{"leaf": [[1]]}]):
        hilora.save_adapters(injected(), path)
        described(ranks=ranks)(path)
        model = vit()
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"has ranks|does not describe adapters"):
            hilora.load_adapters(model, path)
        assert same(snapshot(model), before)


@pytest.mark.parametrize("plain", [True, False], ids=["plain model", "injected model"])
@pytest.mark.parametrize(
    "config", [{"slots": 10**5}, {"r": 2 * 10**5}, {"r": 10**400}, {"target_modules": ["nope"]}, {"r": "x"}]
)
def test_a_description_is_compared_with_the_tensors_before_memory_is_taken(
    config: dict[str, object], plain: bool, path: Path
) -> None:
    hilora.save_adapters(injected(), path)
    described(config={**CONFIG.to_dict(), **config})(path)
    if not plain and config.keys() & {"target_modules"}:
        return  # nothing is searched for there
    with pytest.raises(hilora.HiLoRAError, match=re.escape(str(path))):
        hilora.load_adapters(vit() if plain else injected(), path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_adapters_of_another_dtype_are_named(dtype: torch.dtype, path: Path) -> None:
    hilora.save_adapters(injected(), path)
    rewrite(lambda t, m: t.update({"0.leaf.lora_A": t["0.leaf.lora_A"].to(dtype)}))(path)
    with pytest.raises(hilora.HiLoRAError, match=f"0.leaf.lora_A is {dtype}, expected one of float16"):
        hilora.load_adapters(vit(), path)


def test_only_regular_files_are_replaced_and_the_umask_counts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(hilora.HiLoRAError, match="is a device, a pipe or a socket"):
        hilora.save_adapters(injected(), tmp_path / "pipe")
    assert os.listdir(tmp_path) == ["pipe"]
    before = os.umask(0o022)
    try:
        hilora.save_adapters(injected(), tmp_path / "a")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_flipped_bit_and_a_file_without_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    hilora.save_adapters(injected(), path)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(FileError, match=r"a\.safetensors is damaged: its checksum"):
        hilora.load_adapters(vit(), path)
    hilora.save_adapters(injected(), path)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        earlier = {name: text for name, text in file.metadata().items() if name != "checksum"}
    save_file(tensors, path, earlier)  # as it was written before there were any
    assert all(map(torch.equal, values(hilora.load_adapters(vit(), path)), values(injected())))
