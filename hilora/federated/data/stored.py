"""Images on disk, for sets that do not fit memory: decoded once, then read by index as a tensor is.

They lie in the folder that the environment variable `HILORA_CACHE` names, `~/.cache/hilora` by default, a file a set.
All of it may be deleted at any time; it is made anew where it is needed. A file is a line that says what it is, a line
of JSON that says what it was made from, and a record for each image, all of one length: checksums, a label and pixels.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hilora.errors import FileError, ResourceError

log = logging.getLogger(__name__)
MAGIC = b"hilora-images-1\n"
_HEAD = struct.Struct("<IiI")  # of a record: the checksum of the pixels, the label, the checksum of these two
_MOST_ABOUT = 1 << 16
_REMEDY = "make room there, or let HILORA_CACHE name a folder elsewhere"

Record = tuple[npt.NDArray[np.uint8], int]
"""The pixels of an image, `[3, h, w]`, and its label; -1 where that is kept elsewhere."""
Records = Callable[[int], Iterator[Record]]
"""The images from the i-th on."""


def cache_folder() -> Path:
    """Where sets are kept: what `HILORA_CACHE` says, or `~/.cache/hilora`."""
    return Path(os.environ.get("HILORA_CACHE") or "~/.cache/hilora").expanduser().absolute()


class StoredImages:
    """Images in a file, which are read where they are indexed: `images[index]` is what a tensor of them would give.

    They are read, not mapped: so no limit of memory is in the way, nothing of them stays in memory that is not used,
    and a disk that fails is an exception and not the end of the process. Every image is checked when it is first read.

    Args:
        path: the file; it is kept open, and may be deleted meanwhile.
        file: the same, opened.

    Attributes:
        shape: `[n, 3, h, w]`, of `dtype` uint8 on the CPU as a `device`.
        about: what they were made from.

    Raises:
        FileError: it is not such a file, or not a whole one.
    """

    dtype, device, ndim = torch.uint8, torch.device("cpu"), 4

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self._file = path, file
        try:
            magic, line, _ = os.pread(file.fileno(), _MOST_ABOUT, 0).split(b"\n", 2)
            self.about: dict[str, str] = json.loads(line)
            n, channels, height, width = (int(side) for side in self.about["shape"].split("x"))
            if magic + b"\n" != MAGIC or channels != 3 or min(n, height, width) < 0:
                raise ValueError(f"it begins with {magic!r}, {line!r}")
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise FileError(f"{path} holds no images of this library: remove it") from error
        self.shape = torch.Size((n, channels, height, width))
        self._start = len(magic) + len(line) + 2
        self._bytes = _HEAD.size + self.shape[1:].numel()
        if (found := os.fstat(file.fileno()).st_size) != (expected := self._start + len(self) * self._bytes):
            raise FileError(f"{path} has {found} bytes, expected {expected}: remove it")
        self._checked = bytearray(len(self))
        self._numbers = torch.arange(len(self))

    @classmethod
    def open(cls, path: Path) -> StoredImages:
        """The images in a file."""
        return cls(path, open(path, "rb"))  # it is open as long as they are there

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Tensor | slice | int) -> Tensor:
        """Reads images: uint8 `[..., 3, h, w]` for an index `[...]`.

        Raises:
            FileError: the file is damaged there.
            IndexError: there are no such images.
        """
        wanted = self._numbers[index]
        numbers, places = wanted.flatten().unique(return_inverse=True)  # each once, as they lie on the disk
        if hasattr(os, "posix_fadvise"):  # all of them are under way while the first is read
            for number in numbers.tolist():
                place = self._start + number * self._bytes
                os.posix_fadvise(self._file.fileno(), place, self._bytes, os.POSIX_FADV_WILLNEED)
        pixels = np.empty((len(numbers), *self.shape[1:]), np.uint8)
        for row, number in zip(pixels, numbers.tolist(), strict=True):
            row[:] = self._pixels(number)
        return torch.from_numpy(pixels)[places].view(*wanted.shape, *self.shape[1:])

    def labels(self) -> Tensor:
        """The labels that lie with the images, int64 `[n]`."""
        return torch.tensor([label for _, label in self._heads()], dtype=torch.int64)

    def checksums(self) -> Tensor:
        """The `checksum` of each image, int64 `[n]`; read, as the labels are, without the pixels."""
        return torch.tensor([checksum for checksum, _ in self._heads()], dtype=torch.int64)

    def _heads(self) -> Iterator[tuple[int, int]]:
        for number in range(len(self)):
            found = _unpacked(self._read(number, _HEAD.size))
            if found is None:
                raise self._damaged(number)
            yield found

    def _damaged(self, number: int) -> FileError:
        return FileError(f"{self.path} is damaged, image {number} is not what was written: remove it")

    def _read(self, number: int, length: int) -> bytes:
        try:
            return os.pread(self._file.fileno(), length, self._start + number * self._bytes)
        except OSError as error:
            raise FileError(f"{self.path} cannot be read ({error}): is something wrong with the disk?") from error

    def _pixels(self, number: int) -> npt.NDArray[np.uint8]:
        record = self._read(number, self._bytes)
        if not self._checked[number]:
            if not _is_sound(record, number, self._bytes):
                raise self._damaged(number)
            self._checked[number] = True
        return np.frombuffer(record, np.uint8, offset=_HEAD.size).reshape(self.shape[1:])

    def __reduce__(self) -> tuple[Callable[[Path], StoredImages], tuple[Path]]:
        return StoredImages.open, (self.path,)


def checksum(pixels: bytes | memoryview, number: int) -> int:
    """CRC-32 of an image's pixels at its place in the set."""
    return zlib.crc32(pixels, number)


def stored(name: str, about: Mapping[str, str], shape: tuple[int, int, int, int], records: Records) -> StoredImages:
    """The images of a name: those in the cache if they were made from the same, else made by `records`.

    What is interrupted goes on where it stopped. Two processes may make the same images at once.

    Args:
        name: of the file.
        about: what they are made from; where that is another than before, they are made anew.
        shape: `[n, 3, h, w]`.
        records: makes them.

    Raises:
        ResourceError: there is no room on the disk, or the folder cannot be written.
    """
    header, about = _header(about, shape)
    folder = cache_folder()
    target = folder / f"{name}.images"
    part = folder / f"{name}.{hashlib.sha256(header).hexdigest()[:16]}.part"  # two that write there write the same
    if (found := _found(target, about)) is not None:
        return found
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for other in folder.glob(f"{name}.*.part"):
            if other != part:
                other.unlink(missing_ok=True)
        descriptor = os.open(part, os.O_RDWR | os.O_CREAT, 0o666)
    with open(descriptor, "r+b") as file:
        try:
            _fill(file, header, shape, records, folder)
        except FileError:  # an image cannot be read: what comes next is another set
            part.unlink(missing_ok=True)
            raise
    try:
        os.replace(part, target)
    except FileNotFoundError:  # another process was first
        if (found := _found(target, about)) is None:
            raise
        return found
    if (found := _found(target, about)) is None:
        raise ResourceError(f"{target} is not what was written: is something wrong with the disk, or was it replaced?")
    return found


def stored_for_now(shape: tuple[int, int, int, int], records: Records) -> StoredImages:
    """Images that nothing tells from others, in a file without a name, which ends with the process.

    Raises:
        ResourceError: as `stored`.
    """
    header, _ = _header({}, shape)
    folder = cache_folder()
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it is open as long as they are there
    _fill(file, header, shape, records, folder)
    return StoredImages(folder / "(deleted)", file)


def _header(about: Mapping[str, str], shape: tuple[int, int, int, int]) -> tuple[bytes, dict[str, str]]:
    """What a file begins with, and what it says."""
    said = {**about, "shape": "x".join(map(str, shape))}
    return MAGIC + json.dumps(said).encode() + b"\n", said


def _fill(file: BinaryIO, header: bytes, shape: tuple[int, int, int, int], records: Records, folder: Path) -> None:
    """Writes what is missing in a file that nothing else is written to, or the same."""
    length = _HEAD.size + int(np.prod(shape[1:]))
    done = _sound_records(file, header, length, shape[0])
    needed, free = (shape[0] - done) * length, shutil.disk_usage(folder).free
    if needed > free:
        raise ResourceError(
            f"{shape[0]} images of {shape[2]} x {shape[3]} pixels do not fit memory, and on disk they need "
            f"{needed / 1e9:.1f} GB where {folder} has room for {free / 1e9:.1f} GB: {_REMEDY}"
        )
    log.info(
        "%d images do not fit memory and are kept in %s, %.1f GB%s",
        shape[0], folder, shape[0] * length / 1e9, f"; {done} of them are there" if done else "",
    )  # fmt: skip
    with _writing(folder):
        file.seek(0)
        file.write(header)
        file.truncate(file.seek(done * length, os.SEEK_CUR))
    for number, (pixels, label) in enumerate(records(done), done):
        body = pixels.tobytes()
        head = struct.pack("<Ii", checksum(body, number), label)
        with _writing(folder):
            file.write(head + struct.pack("<I", zlib.crc32(head)) + body)
    with _writing(folder):
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(f"images cannot be kept in {folder} ({error}): {_REMEDY}") from error


def _sound_records(file: BinaryIO, header: bytes, length: int, most: int) -> int:
    """How many records a file that was begun holds, up to the first that is not whole."""
    file.seek(0)
    if file.read(len(header)) != header:
        return 0
    return next((number for number in range(most) if not _is_sound(file.read(length), number, length)), most)


def _is_sound(record: bytes, number: int, length: int) -> bool:
    found = _unpacked(record[: _HEAD.size])
    return (
        found is not None and len(record) == length and checksum(memoryview(record)[_HEAD.size :], number) == found[0]
    )


def _unpacked(head: bytes) -> tuple[int, int] | None:
    """Checksum and label of an image, if they are what was written."""
    if len(head) < _HEAD.size:
        return None
    checksum, label, own = _HEAD.unpack(head)
    return (checksum, label) if own == zlib.crc32(head[:8]) else None


def _found(path: Path, about: Mapping[str, str]) -> StoredImages | None:
    """The images in a file, if they are there and made from the same."""
    try:
        images = StoredImages.open(path)
    except (FileNotFoundError, NotADirectoryError, FileError):
        return None
    return images if images.about == about else None
