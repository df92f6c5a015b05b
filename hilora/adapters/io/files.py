"""Tensors and their description in safetensors files: written whole or not at all, read without running anything."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hilora.errors import FileError, MissingFileError
from hilora.files import atomic

FORMAT = "hilora-1"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def write_tensors(path: str | os.PathLike[str], tensors: dict[str, Tensor], described: dict[str, Any]) -> None:
    """Write tensors and a description (JSON values) to a safetensors file, whole or not at all.

    Raises:
        ValueError: if a tensor is not finite, or there cannot be a file at the path.
    """
    check_finite(tensors, f"nothing is saved to {path}")
    text = json.dumps(described)
    metadata = {"format": FORMAT, "checksum": checksum(text, tensors), "hilora": text}
    write_files({path: serialised(tensors, metadata)})


def write_files(contents: Mapping[str | os.PathLike[str], bytes]) -> None:
    """Write files, making their folders: all of them or none; what was there before stays if one cannot be written.

    Raises:
        ValueError: if there cannot be a file at a path.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            stack.enter_context(atomic(path)).write_bytes(content)


def serialised(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file, its metadata in this order; the library would write it in a random one."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    file = save(plain, metadata)
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.dumps({**json.loads(file[8:start]), "__metadata__": metadata}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + file[start:]


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` wrote, now or before there were checksums.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a corrupt or foreign file, or one that is not finite.
    """
    tensors, metadata = open_tensors(path)
    if metadata.get("format") != FORMAT:
        raise FileError(f"{path} is no file of hilora's: its format is {metadata.get('format')!r}, not {FORMAT!r}")
    if metadata.get("checksum", "") not in ("", checksum(metadata.get("hilora", ""), tensors)):
        raise FileError(f"{path} is damaged: its checksum does not agree with its contents; get the file once more")
    return tensors, parsed(metadata.get("hilora", ""), path)


def open_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of any safetensors file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for a corrupt file, or one that is not finite.
    """
    if not Path(path).is_file():
        raise MissingFileError(f"there is no file of adapters at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    check_finite(tensors, f"{path} is not read")
    return tensors, metadata


def parsed(text: str, path: Any) -> dict[str, Any]:
    """A JSON object that a file holds.

    Raises:
        ValueError: if it is none.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise FileError(f"{path} cannot be read: its description is {type(found).__name__}, expected an object")
    return found


def checksum(described: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a description and named tensors, to the bit, whatever their order."""
    state = hashlib.blake2b(described.encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        state.update(tensor.flatten().view(torch.uint8).numpy().data)
    return state.hexdigest()


def check_floating(tensors: Mapping[str, Tensor], path: Any) -> None:
    """Raise a FileError unless a file's tensors are floating-point numbers that adapters can be made of."""
    for name, value in tensors.items():
        if value.dtype not in FLOATS:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
            raise FileError(f"{path} is not read: {name} is {value.dtype}, expected one of {known}")


def check_finite(tensors: Mapping[str, Tensor], consequence: str) -> None:
    """Raise a FileError if a tensor is not finite."""
    for name, value in tensors.items():
        if value.dtype in FLOATS and not value.isfinite().all():
            raise FileError(f"{name} is not finite: {consequence}")
