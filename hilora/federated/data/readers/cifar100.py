"""CIFAR-100 from either of its layouts on disk. The python layout's pickles are read without running what they name."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import re
import tempfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from hilora.errors import FileError, MissingFileError, ResourceError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers.base import Reader

_BINARY = ("train.bin", "test.bin", "fine_label_names.txt", "coarse_label_names.txt")
_PYTHON = ("train", "test", "meta")
_PIXELS = 3 * 32 * 32


def find_cifar100(path: str | Path) -> Path | None:
    """The folder that holds CIFAR-100's training file: `path`, or `cifar-100-binary` or `cifar-100-python` in it."""
    for folder in (Path(path), Path(path, "cifar-100-binary"), Path(path, "cifar-100-python")):
        if (folder / _BINARY[0]).is_file() or (folder / _PYTHON[0]).is_file():
            return folder
    return None


def read_cifar100(path: str | Path) -> tuple[ImageSet, ImageSet]:
    """Reads CIFAR-100 from its binary or its python layout, in `path` or in its folder of the usual name.

    The superclass of a class is taken from the images, which have both labels.

    Args:
        path: the folder of the files, or the folder that holds `cifar-100-binary` or `cifar-100-python`.

    Returns:
        The training and the test images, uint8 `[n, 3, 32, 32]`.

    Raises:
        MissingFileError: there is no such folder, or files are missing.
        FileError: a file is truncated, corrupt or another's.
    """
    folder = find_cifar100(path)
    if folder is None:
        raise MissingFileError(
            f"no CIFAR-100 in {path}: looked there, in cifar-100-binary and in cifar-100-python for train.bin (binary "
            "layout) and train (python layout). Fetch it from https://www.cs.toronto.edu/~kriz/cifar.html, or with "
            "hilora.federated.data.readers.download_cifar100(path)"
        )
    binary = (folder / _BINARY[0]).is_file()
    if missing := [name for name in (_BINARY if binary else _PYTHON) if not (folder / name).is_file()]:
        raise MissingFileError(f"{folder} has no {', '.join(missing)}: fetch CIFAR-100 again, its archive holds them")
    if binary:
        parts = [_read_records(folder / name) for name in _BINARY[:2]]
        classes, superclasses = (_read_lines(folder / name) for name in _BINARY[2:])
    else:
        parts = [_read_batch(folder / name) for name in _PYTHON[:2]]
        classes, superclasses = _read_meta(folder / _PYTHON[2])
    groups = torch.from_numpy(_group(parts, classes, superclasses))
    train, test = (
        ImageSet(
            images=torch.from_numpy(part.pixels).view(-1, 3, 32, 32),
            labels=torch.from_numpy(part.fine),
            classes=classes,
            name="cifar100",
            groups=groups,
            group_names=superclasses,
        )
        for part in parts
    )
    return train, test


def download_cifar100(path: str | Path) -> None:
    """Fetches CIFAR-100's python layout into `path/cifar-100-python` through torchvision, which checks it by MD5.

    Does nothing where `path` has CIFAR-100 already, and leaves no half of it behind where it fails.

    Raises:
        ImportError: torchvision is not installed.
        ResourceError: the download failed, or brought something else.
    """
    if find_cifar100(path):
        return
    from torchvision.datasets import CIFAR100

    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path, prefix=".download-") as scratch:
            CIFAR100(scratch, download=True)
            os.replace(Path(scratch, "cifar-100-python"), Path(path, "cifar-100-python"))
    except (OSError, RuntimeError) as error:
        raise ResourceError(
            f"CIFAR-100 could not be fetched into {path} ({error}): check the network, or unpack an archive from "
            "https://www.cs.toronto.edu/~kriz/cifar.html there"
        ) from error


class Cifar100(Reader):
    """Where CIFAR-100's training file lies, in either layout."""

    name: ClassVar[str] = "cifar100"

    def recognises(self, path: Path) -> bool:
        return find_cifar100(path) is not None

    def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
        return read_cifar100(path)


class _Part(NamedTuple):
    file: Path
    pixels: npt.NDArray[np.uint8]  # [n, 3072], channel by channel
    fine: npt.NDArray[np.int64]  # [n]
    coarse: npt.NDArray[np.int64]  # [n]


def _group(
    parts: list[_Part], classes: tuple[str, ...], superclasses: tuple[str, ...]
) -> npt.NDArray[np.int64]:  # [classes]
    for part in parts:
        for kind, labels, names in (("fine", part.fine, classes), ("coarse", part.coarse, superclasses)):
            if labels.min() < 0 or labels.max() >= len(names):
                found = f"{labels.min()} to {labels.max()}"
                raise FileError(f"{part.file}: {kind} labels range over {found}, expected 0 to {len(names) - 1}")
    fine = np.concatenate([part.fine for part in parts])
    coarse = np.concatenate([part.coarse for part in parts])
    groups = np.full(len(classes), -1)
    groups[fine] = coarse
    if (two := fine[groups[fine] != coarse]).size:
        files = " or ".join(str(part.file) for part in parts)
        raise FileError(
            f"{files} is corrupt, class {classes[two[0]]!r} lies in two superclasses: fetch CIFAR-100 again"
        )
    return groups


def _read_records(file: Path) -> _Part:
    values = np.fromfile(file, np.uint8)
    if not len(values) or len(values) % (2 + _PIXELS):
        raise FileError(f"{file} has {len(values)} bytes, expected a multiple of {2 + _PIXELS}: fetch it again")
    records = values.reshape(-1, 2 + _PIXELS)
    coarse, fine = records[:, :2].T.astype(np.int64)
    return _Part(file, np.ascontiguousarray(records[:, 2:]), fine, coarse)


def _read_lines(file: Path) -> tuple[str, ...]:
    try:
        return tuple(file.read_text(encoding="utf-8").split())
    except UnicodeDecodeError as error:
        raise FileError(f"{file} is not text ({error}): fetch it again") from error


def _read_batch(file: Path) -> _Part:
    pixels, fine, coarse = _unpickle(file, "data", "fine_labels", "coarse_labels")
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != _PIXELS or not len(pixels):
        raise FileError(f"{file}: data are {pixels.dtype} {pixels.shape}, expected uint8 (n, {_PIXELS})")
    for name, labels in (("fine_labels", fine), ("coarse_labels", coarse)):
        if labels.dtype.kind not in "iu" or labels.shape != (len(pixels),):
            raise FileError(f"{file}: {name} are {labels.dtype} {labels.shape}, expected integers ({len(pixels)},)")
    return _Part(file, np.array(pixels, order="C"), fine.astype(np.int64), coarse.astype(np.int64))


def _read_meta(file: Path) -> tuple[tuple[str, ...], ...]:
    lists = _unpickle(file, "fine_label_names", "coarse_label_names")
    if any(names.dtype.kind not in "SU" or names.ndim != 1 for names in lists):
        raise FileError(f"{file}: fine_label_names and coarse_label_names are not both lists of names")
    try:
        return tuple(tuple(_text(name) for name in names.tolist()) for names in lists)
    except UnicodeDecodeError as error:
        raise FileError(f"{file}: a name of a class is not text ({error}): fetch it again") from error


def _unpickle(file: Path, *keys: str) -> list[npt.NDArray[Any]]:
    """Reads a pickled dict of arrays and lists, and gives what it has under `keys`, as arrays."""
    try:
        stream = io.BytesIO(file.read_bytes())
        _check_sizes(stream)
        content = _ArrayUnpickler(stream, encoding="bytes").load()
        named = {_text(key): value for key, value in content.items()}
        return [_as_array(named[key]) for key in keys]
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = f"{type(error).__name__}: {error}"
        raise FileError(f"{file} cannot be read as CIFAR-100's {', '.join(keys)} ({reason}): fetch it again") from error


def _check_sizes(stream: io.BytesIO) -> None:
    """Sees that a pickle says nothing of sizes that its bytes do not bear out: Python makes room for what it says."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # itself checks lengths
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > number:
            raise pickle.UnpicklingError(f"it puts value {argument} in its memo and has not made so many")
    stream.seek(0)


def _as_array(value: Any) -> npt.NDArray[Any]:
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, list) and any(isinstance(item, list | tuple | dict) for item in value):  # may grow beyond all
        raise pickle.UnpicklingError("it holds lists in a list, expected numbers or names")
    return np.asarray(value)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


class _Dtype:
    """Stands for a dtype in a pickle: plain numbers only."""

    def __init__(self, code: str | bytes, *_: object) -> None:
        if not re.fullmatch("[biuf][1248]", _text(code)):
            raise pickle.UnpicklingError(f"it holds an array of dtype {_text(code)!r}, expected numbers")
        self.dtype: np.dtype[Any] = np.dtype(_text(code))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(_text(state[1]))


class _Array:
    """Stands for an array in a pickle. NumPy's own would trust what the pickle says of its dtype, and of its memory."""

    array: npt.NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, values = state
        self.array = np.frombuffer(values, dtype.dtype).reshape(shape, order="F" if fortran else "C")

    @classmethod
    def reconstruct(cls, *_: object) -> _Array:
        return cls()

    @classmethod
    def from_buffer(cls, values: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
        array = cls()
        array.__setstate__((1, shape, dtype, order == "F", values))
        return array


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes encoded as {encoding!r}, expected 'latin1'")
    return text.encode(encoding)


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain containers and numeric arrays; any other name in the pickle is refused before anything is called."""

    names: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,  # how protocol 2 writes bytes from Python 3
        **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array.reconstruct for core in ("core", "_core")},
        **{(f"numpy.{core}.numeric", "_frombuffer"): _Array.from_buffer for core in ("core", "_core")},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self.names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused; nothing was run") from None
