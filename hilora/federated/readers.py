"""Reads image sets from disk: CIFAR-100 in either of its layouts, or a folder of images."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from hilora.federated.cifar100 import download_cifar100, find_cifar100, read_cifar100
from hilora.federated.data import ImageSet

__all__ = ["download_cifar100", "read_cifar100", "read_image_folder", "read_images"]

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


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


def read_image_folder(path: str | Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Reads a folder of images (jpg, jpeg, png, bmp, webp), one folder a class.

    Where `path` holds `train/<class>/*` with `test/<class>/*` (or `val`), these are the two sets. Else it holds
    `<class>/*`, and a fifth of each class, drawn by `seed`, is for the test. Names that begin with a dot
    are passed over.

    Args:
        path: the folder; its name is the name of the data.
        size: height and width of the result: the shorter side is resized to it, the longer cropped about the centre.
        seed: of the split.

    Returns:
        The training and the test images, uint8 `[n, 3, size, size]`, sorted by class and file name.

    Raises:
        FileNotFoundError, NotADirectoryError: `path` is not a folder.
        ValueError: there are no images, a class has none, an image cannot be read, or `size` is below 1.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        error = NotADirectoryError if root.exists() else FileNotFoundError
        raise error(f"{path} is not a folder, expected CIFAR-100 or a folder of images with one folder a class")
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out and (root / "train").is_dir():
        train, test = _list_classes(root / "train"), _list_classes(held_out)
        if odd := sorted(train.keys() ^ test.keys()):
            raise ValueError(f"{root / 'train'} and {held_out} hold different classes, only one of them has {odd}")
    else:
        rng = np.random.default_rng(seed)
        train, test = _list_classes(root), {}
        for name, files in train.items():
            tests = rng.permutation(len(files)) < min(max(1, round(len(files) / 5)), len(files) - 1)
            train[name] = [file for file, is_test in zip(files, tests, strict=True) if not is_test]
            test[name] = [file for file, is_test in zip(files, tests, strict=True) if is_test]
    name = f"{root.name} (image folder)"
    return _load_classes(train, size, name), _load_classes(test, size, name)


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if broken := [str(entry) for entry in entries if not entry.exists()]:
        raise ValueError(f"{', '.join(broken)}: a link that leads nowhere, or back to itself; remove it")
    classes = {
        entry.name: [
            file for file in sorted(entry.iterdir()) if file.name.lower().endswith(_SUFFIXES) and file.name[0] != "."
        ]
        for entry in entries
        if entry.is_dir()
    }
    if not any(classes.values()):
        raise ValueError(f"{folder} holds no images: expected {folder}/<class>/<image>, {' '.join(_SUFFIXES)}")
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(f"{folder}: the classes {empty} have no images ({' '.join(_SUFFIXES)}): remove or fill them")
    return classes


def _load_classes(classes: dict[str, list[Path]], size: int, name: str) -> ImageSet:
    labels = torch.tensor([label for label, files in enumerate(classes.values()) for _ in files], dtype=torch.int64)
    images = np.empty((len(labels), size, size, 3), np.uint8)
    for row, file in zip(images, (file for files in classes.values() for file in files), strict=True):
        try:
            with Image.open(file) as image:
                row[:] = np.asarray(
                    ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC)
                )
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise ValueError(f"{file} cannot be read as an image ({error}): remove or replace it") from error
    return ImageSet(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), labels, tuple(classes), name)
