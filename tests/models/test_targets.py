from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import hilora
from hilora import HiLoRAConfig, HiLoRAError
from hilora.models.targets import Target, find_targets, order
from tests.helpers import randomise, vit
from tests.vits import torchvision_vit, transformers_vit


def tree(paths: dict[str, nn.Module]) -> nn.Module:
    """A module with other modules at the given paths."""
    root = nn.Module()
    for path, module in paths.items():
        *parents, name = path.split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name, module)
    return root


def linears(*paths: str) -> nn.Module:
    return tree({path: nn.Linear(4, 4) for path in paths})


def test_q_and_v_are_slices_of_a_fused_layer() -> None:
    assert find_targets(vit(depth=1), ("q", "v")) == [
        Target("blocks.0.attn.q", "blocks.0.attn.qkv", (0, 24)),
        Target("blocks.0.attn.v", "blocks.0.attn.qkv", (48, 24)),
    ]
    assert find_targets(vit(depth=1), ["k"]) == [Target("blocks.0.attn.k", "blocks.0.attn.qkv", (24, 24))]
    assert find_targets(vit(depth=1), ["qkv"]) == [Target("blocks.0.attn.qkv", "blocks.0.attn.qkv", (0, 72))]


def test_a_fused_layer_at_the_top_has_slices_too() -> None:
    model = nn.Sequential()
    model.add_module("qkv", nn.Linear(4, 6))
    assert find_targets(model, ["v"]) == [Target("v", "qkv", (4, 2))]


@pytest.mark.parametrize(("name", "parts"), [("kv", {"k": (0, 4), "v": (4, 4)}), ("qk", {"q": (0, 4), "k": (4, 4)})])
def test_other_fused_layers(name: str, parts: dict[str, tuple[int, int]]) -> None:
    model = tree({f"attn.{name}": nn.Linear(4, 8)})
    for part, columns in parts.items():
        assert find_targets(model, [part]) == [Target(f"attn.{part}", f"attn.{name}", columns)]


LIBRARIES = {
    "transformers 4": (
        ["q", "k", "v", "proj", "fc1", "fc2"],
        [
            "vit.encoder.layer.0.attention.attention.query",
            "vit.encoder.layer.0.attention.attention.key",
            "vit.encoder.layer.0.attention.attention.value",
            "vit.encoder.layer.0.attention.output.dense",
            "vit.encoder.layer.0.intermediate.dense",
            "vit.encoder.layer.0.output.dense",
        ],
    ),
    "transformers 5": (
        ["q", "k", "v", "proj", "fc1", "fc2"],
        [
            "vit.layers.0.attention.q_proj",
            "vit.layers.0.attention.k_proj",
            "vit.layers.0.attention.v_proj",
            "vit.layers.0.attention.o_proj",
            "vit.layers.0.mlp.fc1",
            "vit.layers.0.mlp.fc2",
        ],
    ),
    "transformers 4, a late layer": (
        ["proj", "fc1", "fc2"],
        [
            "vit.encoder.layer.11.attention.output.dense",
            "vit.encoder.layer.11.intermediate.dense",
            "vit.encoder.layer.11.output.dense",
        ],
    ),
    "CLIP": (["q", "proj"], ["layers.0.self_attn.q_proj", "layers.0.self_attn.out_proj"]),
    "torchvision": (["fc1", "fc2"], ["encoder.layers.encoder_layer_0.mlp.0", "encoder.layers.encoder_layer_0.mlp.3"]),
    "diffusers": (["q", "k", "v"], ["attn.to_q", "attn.to_k", "attn.to_v"]),
}


@pytest.mark.parametrize(("names", "paths"), LIBRARIES.values(), ids=LIBRARIES.keys())
def test_each_name_finds_the_layers_that_libraries_mean(names: list[str], paths: list[str]) -> None:
    model = linears(*paths, "vit.pooler.dense", "classifier")
    for name, path in zip(names, paths, strict=True):
        assert [target.path for target in find_targets(model, [name])] == [path]
    assert [target.path for target in find_targets(model, names)] == paths


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mlp.fc1", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        ("blocks.1.*", ["blocks.1.attn.qkv", "blocks.1.attn.proj", "blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        ("blocks.[1-9].*.fc?", ["blocks.1.mlp.fc1", "blocks.1.mlp.fc2"]),
        ("1.attn.proj", ["blocks.1.attn.proj"]),
        ("blocks.1.*.[qv]", ["blocks.1.attn.q", "blocks.1.attn.v"]),
        ("head", ["head"]),
    ],
)
def test_ends_of_paths_and_patterns(name: str, found: list[str]) -> None:
    assert [target.path for target in find_targets(vit(), [name])] == found


def test_a_target_named_twice_is_found_once() -> None:
    assert len(find_targets(vit(), ["fc1", "mlp.fc1", "fc1"])) == 2


def test_a_layer_that_is_shared_is_found_once() -> None:
    linear = nn.Linear(4, 4)
    assert find_targets(tree({"a.fc1": linear, "b.fc1": linear}), ["fc1"]) == [Target("a.fc1", "a.fc1", (0, 4))]


@pytest.mark.parametrize(
    ("model", "names", "message"),
    [
        (
            vit(),
            ["fc3"],
            r"target 'fc3' finds no linear layer; the last names of those there are: \['fc1', 'fc2', 'head'",
        ),
        (vit(), ["q", "quv"], "target 'quv' finds no linear layer"),
        (nn.Conv2d(1, 1, 3), ["q"], r"of those there are: \[\]"),
        (vit(), ["patch_embed.proj"], "'patch_embed.proj' finds no linear layer"),
        (vit(), ["q", "qkv"], r"blocks.0.attn.qkv and its slice blocks.0.attn.q are both targets: choose one of them"),
        (vit(), ["blocks.0.*", "v"], "blocks.0.attn.qkv and its slice blocks.0.attn.v are both targets"),
        (tree({"attn.qkv": nn.Linear(4, 8)}), ["q"], "target 'q' finds no linear layer"),
    ],
)
def test_targets_that_cannot_be_are_errors(model: nn.Module, names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_targets(model, names)


def attention(**attributes: Any) -> nn.Module:
    model = tree({"attn.qkv": nn.Linear(4, 12), "attn.proj": nn.Linear(4, 4)})
    for name, value in attributes.items():
        setattr(model.attn, name, value)
    return model


@pytest.mark.parametrize(
    "model",
    [
        attention(head_first=True),
        attention(key_dim=2),
        attention(key_dim=6, num_heads=1),
        attention(proj=nn.Linear(8, 4)),
    ],
    ids=["no width of a head", "no number of heads", "no room for v", "wide values"],
)
def test_a_fused_layer_that_mixes_its_parts_in_an_unknown_way_has_no_slices(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"does not hold q, k and v one after the other .* adapt it whole, as 'qkv'"):
        find_targets(model, ["q"])
    assert find_targets(model, ["qkv"])
    assert not [target for target in find_targets(model) if target.path != target.module]


@pytest.mark.parametrize(
    ("model", "columns", "rows"),
    [
        (attention(head_first=True, dim_head=2), {"q": (0, 4), "v": (8, 4)}, [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11]),
        (attention(key_dim=1, num_heads=2), {"q": (0, 2), "v": (4, 8)}, [0, 6, 1, 7, 2, 3, 4, 5, 8, 9, 10, 11]),
        (attention(key_dim=4, num_heads=1), {"q": (0, 4), "v": (8, 4)}, None),
        (attention(embed_dim=6), {}, None),
    ],
    ids=["all alike", "wide values", "one head", "in order"],
)
def test_heads_one_after_the_other_have_slices(model: nn.Module, columns: Any, rows: list[int] | None) -> None:
    targets = find_targets(model, ("q", "v"))
    if columns:
        assert {target.path[-1]: target.columns for target in targets} == columns
    found = order(model, targets)
    assert (None if found is None else found.tolist()) == rows
    assert order(model, find_targets(model, ["qkv"])) is None, "of the whole layer"


def test_one_layer_a_head_and_a_q_of_one_feature() -> None:
    lists: Any = linears(*(f"attn.qkvs.{i}.conv" for i in (0, 1)), "attn.proj")
    lists.attn.key_dim, lists.attn.num_heads = 1, 2
    assert find_targets(lists, ["v"]) == [Target(f"attn.qkvs.{i}.v", f"attn.qkvs.{i}.conv", (2, 2)) for i in (0, 1)]
    linear: Any = tree({"attn.qkv_proj": nn.Conv2d(4, 9, 1)})
    linear.attn.embed_dim = 4
    assert [target.columns for target in find_targets(linear, ("q", "k", "v"))] == [(0, 1), (1, 4), (5, 4)]


@pytest.mark.parametrize("name", ["q", "qkv"])
def test_a_projection_that_is_a_convolution_is_told(name: str) -> None:
    model = tree({"attn.qkv": nn.Conv2d(4, 12, 3), "attn.proj": nn.Linear(4, 4)})
    with pytest.raises(
        ValueError, match=rf"target '{name}' finds no linear layer; attn.qkv is a convolution of more than a pixel"
    ):
        find_targets(model, [name])


def test_a_fused_layer_that_says_it_is_in_order_has_slices() -> None:
    assert len(find_targets(attention(head_first=False), ["q", "v"])) == 2


def test_all_linear_layers_but_the_classifier() -> None:
    paths = [target.path for target in find_targets(vit(depth=1), "all-linear")]
    assert paths == [f"blocks.0.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]
    assert {target.columns[0] for target in find_targets(vit(depth=1), "all-linear")} == {0}
    assert [t.path for t in find_targets(torchvision_vit(), "all-linear")] == [
        f"encoder.layers.encoder_layer_{i}.mlp.{j}" for i in (0, 1) for j in (0, 3)
    ], "nn.MultiheadAttention never calls its out_proj"
    assert not any("classifier" in target.path for target in find_targets(transformers_vit(), "all-linear"))


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        (r".*\.fc1", ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]),
        (r"blocks\.1\.attn\.(q|v)", ["blocks.1.attn.q", "blocks.1.attn.v"]),
        (r"blocks\.1\.attn.*", ["blocks.1.attn.qkv", "blocks.1.attn.proj"]),
        (r"blocks\.\d+\.mlp\.fc[12]", [f"blocks.{i}.mlp.fc{j}" for i in (0, 1) for j in (1, 2)]),
    ],
)
def test_a_string_is_a_regular_expression_for_the_whole_path(expression: str, found: list[str]) -> None:
    assert [target.path for target in find_targets(vit(), expression)] == found


def test_an_expression_that_matches_only_a_part_finds_nothing() -> None:
    with pytest.raises(ValueError, match="target 'fc1' finds no linear layer"):
        find_targets(vit(), "fc1")


@pytest.mark.parametrize(
    ("pattern", "blocks"),
    [
        ("b.[8-11].fc1", [8, 9, 10, 11]),
        ("b.[0-3].fc1", [0, 1, 2, 3]),
        ("b.[9-10].*", [9, 10]),
        ("b.1[0-1].fc1", [10, 11]),
    ],
)
def test_a_range_of_numbers_means_these_numbers(pattern: str, blocks: list[int]) -> None:
    model = linears(*[f"b.{i}.fc1" for i in range(13)])
    assert [target.path for target in find_targets(model, [pattern])] == [f"b.{i}.fc1" for i in blocks]


@pytest.mark.parametrize("pattern", ["b.[8,10].fc1", "b.[11-8].fc1", "b.[0-9999].fc1"])
def test_a_set_of_signs_that_looks_like_numbers_is_refused(pattern: str) -> None:
    with pytest.raises(HiLoRAError, match=r"set of single signs|expected \[first-last\]"):
        find_targets(linears("b.8.fc1"), [pattern])


def test_blocks_can_be_chosen_by_number() -> None:
    model = hilora.inject(vit(depth=4), HiLoRAConfig(r=2, layers_to_transform=(1, 3)))
    adapted = [path for path, module in model.named_modules() if isinstance(module, hilora.TieredLoRALinear)]
    assert adapted == ["blocks.1.attn.qkv", "blocks.3.attn.qkv"]
    with pytest.raises(HiLoRAError, match=r"layers_to_transform names \[7\]: the targets are in blocks 0, 1"):
        hilora.inject(vit(), HiLoRAConfig(layers_to_transform=(0, 7)))
    for wrong in (3, (), ("1",), (True,)):
        with pytest.raises(HiLoRAError, match="layers_to_transform must be a tuple of block numbers"):
            HiLoRAConfig(layers_to_transform=wrong)  # type: ignore[arg-type]


NAMES = {
    "q": ("attn.wq", "attention.projection_query", "attn.q.linear", "attn.q.ln.linear", "attn.q.conv", "q.proj.conv"),
    "k": ("attn.wk", "attention.projection_key", "attn.k.conv"),
    "v": ("attn.wv", "attention.projection_value", "attn.v.conv"),
    "qkv": ("qkv.linear", "attn.to_qkv", "queries_keys_values.linear", "qkv.conv", "qkvs.0.conv", "attn.qkv_proj"),
    "proj": (
        "attn_out_proj",
        "attn.proj.ln.linear",
        "attn.proj.conv",
        "attn.proj.1.conv",
        "attn_layer.1.merge",
        "attention.projection_layer",
    ),
    "fc1": (
        "mlp.c_fc",
        "mlp.lin1",
        "mlp.dense1",
        "mlp.up_proj",
        "mlp.gate_proj",
        "mlp.weights_in",
        "mlp.fc1_g",
        "mlp.fc1_x",
        "mlp.w12",
        "mlp_layer.1",
        "linear1",
    ),
    "fc2": (
        "mlp.c_proj",
        "mlp.lin2",
        "mlp.dense2",
        "mlp.down_proj",
        "mlp.weights_out",
        "mlp.w3",
        "mlp_out_proj",
        "linear2",
    ),
}


@pytest.mark.parametrize(("name", "path"), [(name, path) for name, paths in NAMES.items() for path in paths])
def test_libraries_have_other_names_for_a_layer(name: str, path: str) -> None:
    model = linears(f"blocks.0.{path}", "blocks.0.other")
    assert [target.path for target in find_targets(model, [name])] == [f"blocks.0.{path}"]


def test_an_alias_finds_no_classifier_no_mlp_of_positions_and_no_shortcut() -> None:
    model = linears(
        "blocks.0.mlp.fc1", "head.fc1", "blocks.0.attn.cpb_mlp.fc1", "blocks.0.rel_pos.mlp.fc1", "shortcut.fc1",
        "patch_embed.fc1", "embeddings.fc1", "conv.se.fc1", "layers.squeeze_excitation.fc1",
    )  # fmt: skip
    assert [target.path for target in find_targets(model, ["fc1"])] == ["blocks.0.mlp.fc1"]
    assert len(find_targets(model, ["head.fc1", "cpb_mlp.fc1"])) == 2, "a name of its own does"


def test_what_could_be_adapted_is_a_table() -> None:
    found = hilora.find_targets(vit())
    assert len(found) == 2 * (4 + 3) + 1
    assert str(found).splitlines() == [
        "name  layers  path",
        "qkv   2       blocks.*.attn.qkv",
        "q     2       blocks.*.attn.q     columns 0+24",
        "k     2       blocks.*.attn.k     columns 24+24",
        "v     2       blocks.*.attn.v     columns 48+24",
        "proj  2       blocks.*.attn.proj",
        "fc1   2       blocks.*.mlp.fc1",
        "fc2   2       blocks.*.mlp.fc2",
        "head  1       head",
    ]


class Partly(nn.Module):
    """A list of blocks of which the last is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"fc1": nn.Linear(4, 4)}) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in list(self.blocks)[:2]:
            x = block["fc1"](x)  # type: ignore[index]
        return x


def test_a_layer_that_is_never_called_is_named_and_left_out_unless_it_was_asked_for() -> None:
    config = HiLoRAConfig(r=2, target_modules=("fc1",), modules_to_save=())
    with pytest.warns(UserWarning, match=r"the model never calls blocks\.2\.fc1: left without adapters"):
        model = hilora.inject(Partly(), config, example_input=torch.ones(2, 4))
    adapted = [path for path, module in model.named_modules() if isinstance(module, hilora.TieredLoRALinear)]
    assert adapted == ["blocks.0.fc1", "blocks.1.fc1"]
    config = HiLoRAConfig(r=2, target_modules=("fc1", "blocks.2.fc1"), modules_to_save=())
    with pytest.raises(hilora.UncalledLayerError, match=r"never calls 1 of the adapted layers \(blocks\.2\.fc1"):
        hilora.inject(Partly(), config, example_input=torch.ones(2, 4))


def test_an_alias_finds_nothing_of_what_is_trained_whole() -> None:
    model = linears("blocks.0.fc1", "end.fc1")
    assert len(find_targets(model, ["fc1"])) == 2
    assert [t.path for t in find_targets(model, ["fc1"], modules_to_save=("end",))] == ["blocks.0.fc1"]
    assert [t.path for t in find_targets(model, "all-linear", modules_to_save=("end",))] == ["blocks.0.fc1"]
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("fc1",), modules_to_save=("end",)))
    assert [name for name, p in model.named_parameters() if p.requires_grad and name.startswith("end")] == [
        "end.fc1.weight",
        "end.fc1.bias",
    ]


def small(name: str, **fields: Any) -> Any:
    given = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 32, "num_classes": 5} | fields
    return timm.create_model(name, pretrained=False, **given)


def test_a_parallel_block_holds_an_mlp_before_q_k_and_v() -> None:
    for name in ("vit_pwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"):
        model = small(name)
        mlp = model.blocks[0].in_split[0]
        assert find_targets(model, ["q", "v"]) == [
            Target("blocks.0.q", "blocks.0.in_proj", (mlp, 48)),
            Target("blocks.0.v", "blocks.0.in_proj", (mlp + 96, 48)),
        ]


def test_a_slice_of_a_parallel_block_changes_that_slice_alone() -> None:
    model = small("vit_pwee_patch16_reg1_gap_256")
    hilora.inject(model, HiLoRAConfig(r=2, target_modules=("q", "v")))
    randomise(model)
    layer, x = model.blocks[0].in_proj, torch.randn(2, 3, 48)
    with torch.no_grad():
        adapted = layer(x)
        with hilora.disable_adapters(model):
            changed = (adapted - layer(x)).flatten(0, 1).abs().amax(0) > 0
    start = model.blocks[0].in_split[0]
    assert changed.nonzero().flatten().tolist() == [*range(start, start + 48), *range(start + 96, start + 144)]


def test_an_in_proj_of_unknown_parts_is_whole() -> None:
    assert [t.path for t in find_targets(linears("mixer.in_proj"))] == ["mixer.in_proj"]


def test_a_global_attention_that_is_given_q_holds_k_and_v() -> None:
    model = timm.create_model("gcvit_xxtiny", pretrained=False)
    found = {name: len(find_targets(model, [name])) for name in ("qkv", "q", "k", "v")}
    assert found == {"qkv": 12, "q": 6, "k": 12, "v": 12}
    whole = next(m for m in model.modules() if getattr(m, "use_global", False)).qkv
    part = next(t for t in find_targets(model, ["v"]) if model.get_submodule(t.module) is whole)
    assert part.columns == (whole.out_features // 2, whole.out_features // 2)


def test_layers_of_torchvision_s_maxvit() -> None:
    model = torchvision.models.MaxVit((64, 64), 16, 2, [16], [1], 16, 0.0, num_classes=5)
    found = {name: len(find_targets(model, [name])) for name in ("q", "v", "proj", "fc1", "fc2")}
    assert set(found.values()) == {2}, found
