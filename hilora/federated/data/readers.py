"""Reads image sets from disk: CIFAR-100 in either of its layouts, a folder of images, or folders of several domains."""

from __future__ import annotations

from pathlib import Path

from hilora.federated.data.cifar100 import download_cifar100, find_cifar100, read_cifar100
from hilora.federated.data.domains import read_domains
from hilora.federated.data.folders import read_image_folder
from hilora.federated.data.images import ImageSet

__all__ = ["download_cifar100", "read_cifar100", "read_domains", "read_image_folder", "read_images"]


def read_images(path: str | Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Reads CIFAR-100 where `path` has one of its layouts, else a folder of images.

    Args:
        path: a folder for `read_cifar100` or for `read_image_folder`.
        size: height and width of a folder's images; CIFAR-100 keeps its 32.
        seed: of the split of a folder that has no test images of its own.

    Returns:
        The training and the test images.

    Raises:
        OSError, ValueError: as the two readers.
    """
    return read_cifar100(path) if find_cifar100(path) else read_image_folder(path, size, seed)
