"""Image files as pixels. Only the formats that are named here are opened, whatever a file is called."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import stat
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torch import Tensor

from hilora.errors import FileError, InvalidValueError
from hilora.federated.data.memory import fits
from hilora.federated.data.stored import StoredImages, stored
from hilora.reporting.progress import counted

log = logging.getLogger(__name__)
_KINDS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "BMP": (".bmp",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "GIF": (".gif",),
} | ({"AVIF": (".avif",)} if "avif" in features.modules and features.check("avif") else {})  # Pillow 11.3 has it
FORMATS = tuple(_KINDS)
"""What is opened. Pillow knows many more, PostScript among them, which it hands to an interpreter."""
SUFFIXES = tuple(suffix for suffixes in _KINDS.values() for suffix in suffixes)
"""How files of images are called, in lower case."""
BACKGROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as paper and most screens have it."""


_MOST_BROKEN = 10  # files that an error names


def load_images(files: Sequence[Path], size: int) -> Tensor | StoredImages:
    """Reads images, uint8 `[n, 3, size, size]`: the shorter side resized, the longer cropped about the centre.

    Grey of 16 bits is scaled to 8, transparent pixels are laid on white, and of several frames or pages the first is
    taken. A file may be of another of the formats than its name says. Where they would take more than half of the
    memory that is available they are kept on disk (`stored`).

    Raises:
        FileError: some cannot be read, or are pipes, devices or folders, or have more pixels than Pillow's
            `Image.MAX_IMAGE_PIXELS`; names the first ten.
        InvalidValueError: `size` is below 1.
        ResourceError: they fit neither memory nor the disk.
    """
    if size < 1:
        raise InvalidValueError(f"size is {size}, expected at least 1 pixel")
    shape = (len(files), 3, size, size)
    if fits(math.prod(shape)):
        images = np.empty(shape, np.uint8)
        for pixels, image in zip(images, _decoded(files, size), strict=True):
            pixels[:] = image
        return torch.from_numpy(images)
    paths, states = hashlib.sha256(str(size).encode()), hashlib.sha256()
    for file in files:
        paths.update(b"\0" + os.fsencode(file.absolute()))
        states.update(_state(file))
    about = {"paths": paths.hexdigest(), "states": states.hexdigest(), "pillow": PIL.__version__}
    name = paths.hexdigest()[:16]
    return stored(name, about, shape, lambda done: ((image, -1) for image in _decoded(files, size, done)))


def to_pixels(image: Image.Image, size: int) -> npt.NDArray[np.uint8]:
    """An open image as `load_images` makes it, `[3, size, size]`."""
    format = image.format
    upright = ImageOps.exif_transpose(image, in_place=True) or image
    fitted = ImageOps.fit(_to_rgb(upright, format), (size, size), Image.Resampling.BICUBIC)
    return np.asarray(fitted).transpose(2, 0, 1)


def _decoded(files: Sequence[Path], size: int, start: int = 0) -> Iterator[npt.NDArray[np.uint8]]:
    """The images from the i-th on; after one that cannot be read none, but a search for more of these.

    Raises:
        FileError: after the last, naming them.
    """
    broken: list[tuple[Path, Exception]] = []
    for file in counted(files[start:], len(files), "images", start):
        try:
            pixels = _load(file, size)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            broken.append((file, error))
            if len(broken) == 1:
                log.warning("%s cannot be read as an image; looking for others", file)
            if len(broken) == _MOST_BROKEN:
                break
        else:
            if not broken:
                yield pixels
    if broken:
        raise _error(broken) from broken[0][1]


def _error(broken: Sequence[tuple[Path, Exception]]) -> FileError:
    if len(broken) == 1:
        ((file, error),) = broken
        return FileError(f"{file} cannot be read as an image: {_reason(error)}; remove or replace it")
    said = "".join(f"\n  {file}: {_reason(error)}" for file, error in broken)
    more = " (there may be more)" if len(broken) == _MOST_BROKEN else ""
    return FileError(f"{len(broken)} files{more} cannot be read as images, remove or replace them:{said}")


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(FORMATS)}"
    if isinstance(error, Image.DecompressionBombWarning | Image.DecompressionBombError):
        return f"it has more than {Image.MAX_IMAGE_PIXELS} pixels, make it smaller or raise PIL.Image.MAX_IMAGE_PIXELS"
    return "there is too little memory for it" if isinstance(error, MemoryError) else str(error)


def _state(file: Path) -> bytes:
    """What changes where a file does: its size, and when it was written; nothing of one that cannot be looked at."""
    try:
        found = file.stat()
    except OSError:
        return b"\0"
    return struct.pack("<Qq", found.st_size, found.st_mtime_ns)


def _load(file: Path, size: int) -> npt.NDArray[np.uint8]:
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is a folder, a pipe or a device, expected a file")
    if not found.st_size:
        raise ValueError("it is empty, it has 0 bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file, formats=FORMATS) as image:
            return to_pixels(image, size)


def _to_rgb(image: Image.Image, format: str | None) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and format == "TIFF"):
        raise ValueError(f"its values, of mode {image.mode}, have no known range, expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would make white of all above 255
        grey = np.asarray(image).clip(0, 65535).astype(np.uint32)
        grey *= 255
        grey += 32767
        grey //= 65535
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
