"""Trees of tensors, stacks and plain values in one file that can be trusted: safetensors with a checksum inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save
from torch import Tensor

from hilora.adapters.io.files import checksum
from hilora.adapters.table import AdapterTable, Stack, Values
from hilora.errors import FileError, InvalidTypeError
from hilora.federated.protocol import Head

FORMAT = "hilora-archive-1"
KINDS: dict[str, Callable[[dict[str, Tensor]], Stack]] = {
    "adapters": AdapterTable.of,
    "head": lambda tensors: Head(**tensors),
    "values": lambda tensors: Values(**tensors),
}
NAMES: dict[type[Stack], str] = {AdapterTable: "adapters", Head: "head", Values: "values"}
TENSOR, STACK = "a tensor", "a stack"  # keys of what stands for these in the tree


def packed(tree: Mapping[str, Any]) -> bytes:
    """The bytes of a file: dicts with texts as keys, lists, tuples (which become lists), tensors, stacks, and what JSON
    has.

    Raises:
        InvalidTypeError: for anything else, or a stack of a kind that the library does not know.
    """
    tensors: dict[str, Tensor] = {}
    described = json.dumps(_plain(tree, tensors), allow_nan=True)
    about = {"format": FORMAT, "checksum": checksum(described, tensors), "tree": described}
    return save(tensors, {"hilora": json.dumps(about)})


def unpacked(source: Path | bytes) -> dict[str, Any]:
    """The tree in a file, or in its bytes.

    Raises:
        FileError: if it is damaged, or something else.
    """
    name = source if isinstance(source, Path) else "what was received"
    try:
        tensors, metadata = _opened(source)
        about = json.loads(metadata.get("hilora", "{}"))
        if about.get("format") != FORMAT:
            raise FileError(f"{name} is no file of a run: its format is {about.get('format')!r}, not {FORMAT!r}")
        if checksum(about["tree"], tensors) != about["checksum"]:
            raise FileError(f"{name} is damaged: its checksum does not agree with its contents")
        tree = _built(json.loads(about["tree"]), tensors)
        if not isinstance(tree, dict):
            raise FileError(f"{name} has a {type(tree).__name__}, expected names and values")
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise FileError(f"{name} is not readable: {error}") from error
    return tree


def _opened(source: Path | bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata; a file is not read as a whole first."""
    if isinstance(source, Path):
        with safe_open(source, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    header = json.loads(source[8 : 8 + int.from_bytes(source[:8], "little")])
    return load(source), header.get("__metadata__", {})


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """The same with names in the place of tensors, which are collected."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {TENSOR: name}
    if isinstance(value, Stack):
        if type(value) not in NAMES:
            kind = type(value).__name__
            raise InvalidTypeError(f"a {kind} cannot be saved: keep its tensors instead, as Values(**stack.tensors())")
        return {STACK: NAMES[type(value)], "tensors": _plain(value.tensors(), tensors)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, tensors) for inner in value]
    if value is None or isinstance(value, str | int | float):
        return value
    raise InvalidTypeError(
        f"a {type(value).__name__} cannot be saved in a checkpoint: keep tensors, numbers, texts, and dicts and lists "
        "of these; an attribute that is no state has a name that begins with an underscore"
    )


def _built(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `_plain` was given."""
    if isinstance(value, list):
        return [_built(inner, tensors) for inner in value]
    if not isinstance(value, dict):
        return value
    if TENSOR in value:
        return tensors[value[TENSOR]]
    if STACK in value:
        return KINDS[value[STACK]](_built(value["tensors"], tensors))
    return {key: _built(inner, tensors) for key, inner in value.items()}
