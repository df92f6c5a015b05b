"""A folder of images, one folder a class; and what its reader shares with that of domains."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from hilora.federated.data.images import ImageSet

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


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
    root = open_folder(path, "CIFAR-100 or a folder of images with one folder a class")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out and (root / "train").is_dir():
        train, test = list_classes(root / "train"), list_classes(held_out)
        if odd := sorted(train.keys() ^ test.keys()):
            raise ValueError(f"{root / 'train'} and {held_out} hold different classes, only one of them has {odd}")
    else:
        rng = np.random.default_rng(seed)
        train, test = list_classes(root), {}
        for name, files in train.items():
            train[name], test[name] = split(files, rng)
    train_set, test_set = (
        ImageSet(
            images=load_images([file for files in part.values() for file in files], size),
            labels=torch.tensor([label for label, files in enumerate(part.values()) for _ in files], dtype=torch.int64),
            classes=tuple(part),
            name=f"{root.name} (image folder)",
        )
        for part in (train, test)
    )
    return train_set, test_set


def open_folder(path: str | Path, expected: str) -> Path:
    """The absolute path of a folder, links in its name kept.

    Raises:
        FileNotFoundError, NotADirectoryError: it is none; says what was `expected`.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        error = NotADirectoryError if root.exists() else FileNotFoundError
        raise error(f"{path} is not a folder, expected {expected}")
    return root


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, by name, without what begins with a dot.

    Raises:
        ValueError: a link in it leads nowhere.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    if broken := [str(entry) for entry in entries if not entry.exists()]:
        raise ValueError(f"{', '.join(broken)}: a link that leads nowhere, or back to itself; remove it")
    return entries


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class of a folder, both by name.

    Raises:
        ValueError: there are no images, or a class has none.
    """
    classes = {
        entry.name: [
            file for file in sorted(entry.iterdir()) if file.name.lower().endswith(SUFFIXES) and file.name[0] != "."
        ]
        for entry in list_folder(folder)
        if entry.is_dir()
    }
    if not any(classes.values()):
        raise ValueError(f"{folder} holds no images: expected {folder}/<class>/<image>, {' '.join(SUFFIXES)}")
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(f"{folder}: the classes {empty} have no images ({' '.join(SUFFIXES)}): remove or fill them")
    return classes


def split(files: Sequence[Path], rng: np.random.Generator) -> tuple[list[Path], list[Path]]:
    """Draws a fifth of the files for the test, one at least, while one is left for the training: training, test."""
    tests = rng.permutation(len(files)) < min(max(1, round(len(files) / 5)), len(files) - 1)
    train = [file for file, is_test in zip(files, tests, strict=True) if not is_test]
    test = [file for file, is_test in zip(files, tests, strict=True) if is_test]
    return train, test


def load_images(files: Sequence[Path], size: int) -> Tensor:
    """Reads images, uint8 `[n, 3, size, size]`: the shorter side resized, the longer cropped about the centre.

    Raises:
        ValueError: one cannot be read, or `size` is below 1.
    """
    if size < 1:
        raise ValueError(f"size is {size}, expected at least 1 pixel")
    images = np.empty((len(files), 3, size, size), np.uint8)
    for pixels, file in zip(images, files, strict=True):
        try:
            with Image.open(file) as image:
                fitted = ImageOps.fit(
                    ImageOps.exif_transpose(image).convert("RGB"), (size, size), Image.Resampling.BICUBIC
                )
                pixels[:] = np.asarray(fitted).transpose(2, 0, 1)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything
            raise ValueError(f"{file} cannot be read as an image ({error}): remove or replace it") from error
    return torch.from_numpy(images)
