"""Image files as pixels. Only the formats that are named here are opened, whatever a file is called."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps, features
from torch import Tensor

from hilora.errors import FileError, InvalidValueError

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


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """Reads images, uint8 `[n, 3, size, size]`: the shorter side resized, the longer cropped about the centre.

    Grey of 16 bits is scaled to 8, transparent pixels are laid on white, and of several frames or pages the first is
    taken. A file may be of another of the formats than its name says.

    Raises:
        FileError: one cannot be read, or is a pipe, a device or a folder.
        InvalidValueError: `size` is below 1.
    """
    if size < 1:
        raise InvalidValueError(f"size is {size}, expected at least 1 pixel")
    images = np.empty((len(files), 3, size, size), np.uint8)
    for pixels, file in zip(images, files, strict=True):
        try:
            pixels[:] = _load(file, size).transpose(2, 0, 1)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise FileError(f"{file} cannot be read as an image ({error}): remove or replace it") from error
    return torch.from_numpy(images)


def _load(file: Path, size: int) -> npt.NDArray[np.uint8]:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError("it is a folder, a pipe or a device, expected a file")
    with Image.open(file, formats=FORMATS) as image:
        upright = _to_rgb(ImageOps.exif_transpose(image), image.format)
        return np.asarray(ImageOps.fit(upright, (size, size), Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image, format: str | None) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and format == "TIFF"):
        raise ValueError(f"its values, of mode {image.mode}, have no known range, expected 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would make white of all above 255
        grey = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((grey * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        paper = Image.new("RGBA", image.size, (*BACKGROUND, 255))
        return Image.alpha_composite(paper, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
