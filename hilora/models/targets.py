"""Which layers, and which slices of fused ones, the names in `target_modules` mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from torch import Tensor, nn

from hilora.errors import InvalidValueError
from hilora.models.attention import PACKED, is_packed
from hilora.models.fused import fused
from hilora.models.heads import find_heads
from hilora.models.pointwise import widths
from hilora.models.registry import aliases

ALL_LINEAR = "all-linear"


class Target(NamedTuple):
    """A layer, or some columns of its output, to adapt.

    Attributes:
        path: of the projection: a slice of `attn.qkv` is called `attn.q`.
        module: path of the layer.
        columns: (start, width), where heads that are mixed in the output are side by side.
    """

    path: str
    module: str
    columns: tuple[int, int]


class Targets(list[Target]):
    """Targets that print as a table: a line for each kind of layer, with what it can be called."""

    def __str__(self) -> str:
        kinds: dict[tuple[str, ...], int] = {}
        for target in self:
            name = _called(target.path)
            where = re.sub(r"(?<![^.])\d+(?![^.])", "*", target.path)
            part = "" if target.path == target.module else f"columns {target.columns[0]}+{target.columns[1]}"
            kind = (name, where, part)
            kinds[kind] = kinds.get(kind, 0) + 1
        rows = [("name", "layers", "path", "")]
        rows += [(name, str(count), where, part) for (name, where, part), count in kinds.items()]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join(line.rstrip() for line in lines)


def find_targets(
    model: nn.Module,
    names: Iterable[str] | str | None = None,
    blocks: Iterable[int] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> Targets:
    """The projections of a model that `names` mean, in the order of the model; print them for a table.

    Args:
        model: any module.
        names: names and patterns as `HiLoRAConfig.target_modules` explains them, for linear layers and 1 × 1
            convolutions; or a string: "all-linear" for all linear layers but the classifier's, else a regular
            expression that the whole of a path must match. None: all that there are.
        blocks: only those of which the first number in the path is one of these.
        modules_to_save: what is trained whole, which only a name of its own means; None: the classifier.

    Raises:
        ValueError: if a name or a block finds nothing, if projections overlap (`qkv` beside `q`), or if it is not known
            where a fused layer holds q, k and v.
    """
    candidates = [target for path, out in _layers(model).items() for target in _projections(model, path, out)]
    if names is None:
        return Targets(target for target in candidates if not _is_mixed(target))
    aside = _of_heads(model, modules_to_save)
    meant = set()
    for name in [names] if isinstance(names, str) else names:
        if name == ALL_LINEAR and isinstance(names, str):
            matched = _all_linear(model, candidates, aside)
        elif isinstance(names, str):
            matched = _whole_first([target for target in candidates if re.fullmatch(name, target.path)])
        else:
            matched = _meant(candidates, name, aside)
        if not matched:
            instead = _instead(model, candidates, "" if isinstance(names, str) else name)
            raise InvalidValueError(f"target {name!r} finds no linear layer; {instead}")
        meant.update(matched)
    found = _of_blocks([target for target in candidates if target in meant], blocks)
    whole = {target.module for target in found if target.path == target.module}
    for target in found:
        if _is_mixed(target):
            raise InvalidValueError(
                f"{target.module} does not hold q, k and v one after the other in equal parts, and does not say how it "
                f"mixes them: adapt it whole, as {_called(target.module)!r}"
            )
        if target.path != target.module and target.module in whole:
            raise InvalidValueError(f"{target.module} and its slice {target.path} are both targets: choose one of them")
    return Targets(found)


def _of_blocks(found: list[Target], blocks: Iterable[int] | None) -> list[Target]:
    if blocks is None:
        return found
    numbers = {target: re.search(r"(?<![^.])\d+(?![^.])", target.path) for target in found}
    of = {target: int(match[0]) for target, match in numbers.items() if match}
    if missing := set(blocks) - set(of.values()):
        there = ", ".join(map(str, sorted(set(of.values()))))
        raise InvalidValueError(f"layers_to_transform names {sorted(missing)}: the targets are in blocks {there}")
    return [target for target in found if of.get(target) in set(blocks)]


def _instead(model: nn.Module, candidates: list[Target], name: str) -> str:
    """What there is in place of the linear layers of a name."""
    convolutions = [
        target
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d)
        for target in _projections(model, path, module.out_channels)
    ]
    if alike := _meant(convolutions, name):
        return f"{alike[0].module} is a convolution of more than a pixel, and adapters are for linear layers"
    return f"the last names of those there are: {sorted({target.path.rpartition('.')[2] for target in candidates})}"


def _layers(model: nn.Module) -> dict[str, int]:
    """The widths of the layers, by their paths; also of those that are to be had by opening an attention."""
    found: dict[str, int] = {}
    for path, module in model.named_modules():
        if sizes := widths(module):
            found[path] = sizes[1]
        elif is_packed(module):
            found[f"{path}.{PACKED}" if path else PACKED] = 3 * module.embed_dim
    return found


def _projections(model: nn.Module, path: str, out: int) -> list[Target]:
    """A layer, and if it is a fused one also its slices: those of `attn.qkv` are `attn.q`, `attn.k` and `attn.v`."""
    whole, held = Target(path, path, (0, out)), fused(model, path, out)
    columns = {} if held is None else held.columns()
    parent, dot, _ = path.rpartition(".")
    return [whole, *(Target(f"{parent}{dot}{part}", path, place) for part, place in columns.items())]


def order(model: nn.Module, targets: Sequence[Target]) -> Tensor | None:
    """Where in a layer's output the columns of its targets really are, int64 `[out]`; None where they are in order."""
    first = targets[0]
    sizes = widths(model.get_submodule(first.module))
    held = fused(model, first.module, sizes[1]) if sizes and first.path != first.module else None
    return None if held is None else held.order()


def _is_mixed(target: Target) -> bool:
    return target.columns[1] == 0


def _meant(candidates: list[Target], name: str, aside: Collection[str] = ()) -> list[Target]:
    """The projections that a name matches; one that is an alias finds nothing that is set aside."""
    known = aliases()
    patterns = [
        pattern for end in known.get(name, [name]) for spread in _spread(end) for pattern in (spread, f"*.{spread}")
    ]
    matched = [target for target in candidates if any(fnmatchcase(target.path, pattern) for pattern in patterns)]
    if name in known:
        matched = [
            target for target in matched if target.module not in aside and not OTHER.search(target.module.lower())
        ]
    return _whole_first(matched)


# What has layers of the same names as blocks have: MLPs of positions, embeddings of patches, shortcuts, and what weighs
# channels (squeeze and excitation).
OTHER = re.compile(
    r"(?<![^.])(cpb_mlp|meta_mlp|rel_pos\w*|pos_\w+|\w*position\w*|\w*embeds?|embeddings|\w*shortcut\w*|downsample|se|squeeze_\w+)(?![^.])"
)


def _spread(pattern: str) -> list[str]:
    """A pattern for each number of a range such as `[8-11]`, which would else be a set of the signs 8-1 and 1."""
    sets = re.findall(r"\[[^\]]*\d\d[^\]]*\]", pattern)
    if not sets:
        return [pattern]
    if any(re.fullmatch(r"\[\d+-\d+\]", found) is None for found in sets):
        raise InvalidValueError(
            f"target {pattern!r} has {sets[0]}, a set of single signs: write a range of numbers as [8-11], or use "
            "layers_to_transform=(8, 10)"
        )
    wide = next(m for m in re.finditer(r"\[(\d+)-(\d+)\]", pattern) if len(m[1]) > 1 or len(m[2]) > 1)
    first, last = int(wide[1]), int(wide[2])
    if not first <= last < first + 1000:
        raise InvalidValueError(f"target {pattern!r} has the range {wide[0]}: expected [first-last]")
    return [
        spread
        for number in range(first, last + 1)
        for spread in _spread(f"{pattern[: wide.start()]}{number}{pattern[wide.end() :]}")
    ]


def _called(path: str) -> str:
    """The alias of a layer, or else the last name of its path."""
    target = Target(path, path, (0, 0))
    return next((name for name in aliases() if _meant([target], name)), path.rpartition(".")[2])


def _of_heads(model: nn.Module, names: Sequence[str] | None) -> set[str]:
    """Paths of the layers of what is trained whole, which only a name of their own means."""
    heads = {id(module) for head in find_heads(model, names) for module in head.modules()}
    return {path for path, module in model.named_modules() if id(module) in heads}


def _whole_first(matched: list[Target]) -> list[Target]:
    """A fused layer as a whole, where a pattern matches that and its slices."""
    whole = {target.module for target in matched if target.path == target.module}
    return [target for target in matched if target.path == target.module or target.module not in whole]


def _all_linear(model: nn.Module, candidates: list[Target], aside: Collection[str]) -> list[Target]:
    """All linear layers, whole, but those that are set aside, and those of nn.MultiheadAttention, which never calls
    them; no convolutions."""
    attentions = [path for path, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    uncalled = {f"{path}.{name}" if path else name for path in attentions for name in (PACKED, "out_proj")}
    convolutions = {path for path, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    left_out = uncalled.union(aside, convolutions)
    return [target for target in candidates if target.path == target.module and target.module not in left_out]
