"""Reads image sets from disk: CIFAR-100 in either of its layouts, a folder of images, or folders of several domains."""

from __future__ import annotations

from pathlib import Path

from hilora.discovery import enter, find_classes
from hilora.errors import InvalidValueError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers.base import Reader
from hilora.federated.data.readers.cifar100 import download_cifar100, read_cifar100
from hilora.federated.data.readers.domains import read_domains
from hilora.federated.data.readers.image_folder import read_image_folder

__all__ = [
    "READERS",
    "Reader",
    "download_cifar100",
    "read_cifar100",
    "read_domains",
    "read_image_folder",
    "read_images",
    "register",
]

READERS: dict[str, type[Reader]] = find_classes(__name__, __path__, Reader)  # type: ignore[type-abstract]
"""The readers that there are, by name."""


def register(kind: type[Reader]) -> type[Reader]:
    """Makes a reader that lives elsewhere known to `read_images`; returns it.

    Raises:
        InvalidTypeError, InvalidValueError: it is no reader, or its name is another's.
    """
    enter(READERS, kind, Reader)  # type: ignore[type-abstract]
    return kind


def read_images(path: str | Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Reads images by the reader that recognises them: CIFAR-100, domains, glyphs, or else a folder of images.

    Args:
        path: of the data, as `read_cifar100`, `read_domains` or `read_image_folder` takes it; `glyphs` draws these.
        size: height and width of a folder's images; CIFAR-100 and glyphs keep their 32.
        seed: of the split of a folder that has no test images of its own, or of the glyphs.

    Returns:
        The training and the test images.

    Raises:
        OSError, ValueError: as the reader.
        InvalidValueError: several readers recognise them.
    """
    place = Path(path)
    readers = [kind() for kind in READERS.values()]
    for fallback in (False, True):
        found = [reader for reader in readers if reader.fallback == fallback and reader.recognises(place)]
        if len(found) > 1:
            names = " and ".join(reader.name for reader in found)
            raise InvalidValueError(f"{path} is data of {names}: keep one of them there, or read it by its own reader")
        if found:
            return found[0].read(place, size, seed)
    raise InvalidValueError(f"{path} is data of no reader, expected one of {', '.join(READERS)}")
