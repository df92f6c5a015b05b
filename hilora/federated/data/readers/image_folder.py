"""A folder of images, one folder a class."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hilora.errors import FileError
from hilora.federated.data.files import check_names, list_classes, open_folder, split
from hilora.federated.data.images import ImageSet
from hilora.federated.data.pixels import load_images
from hilora.federated.data.readers.base import Reader


def read_image_folder(path: str | Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Reads a folder of images (those called as `pixels.SUFFIXES` says), one folder a class.

    Where `path` holds `train/<class>/*` with `test/<class>/*` (or `val`), these are the two sets. Else it holds
    `<class>/*`, and a fifth of each class, drawn by `seed`, is for the test. Names that begin with a dot and what
    systems leave in folders are passed over; so are, with a warning, other pictures and those in folders below a class.

    Args:
        path: the folder; its name is the name of the data.
        size: height and width of the result: the shorter side is resized to it, the longer cropped about the centre.
        seed: of the split.

    Returns:
        The training and the test images, uint8 `[n, 3, size, size]`, sorted by class and file name.

    Raises:
        MissingFileError, NotAFolderError: `path` is not a folder.
        FileError: there are no images, a class has none, two classes have the same name to some systems, or an image
            cannot be read.
        InvalidValueError: `size` is below 1.
    """
    root = open_folder(path, "CIFAR-100 or a folder of images with one folder a class")
    held_out = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    if held_out and (root / "train").is_dir():
        train, test = list_classes(root / "train"), list_classes(held_out)
        check_names(sorted(train.keys() | test.keys()), str(root))
        if odd := sorted(train.keys() ^ test.keys()):
            raise FileError(f"{root / 'train'} and {held_out} hold different classes, only one of them has {odd}")
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


class ImageFolder(Reader):
    """Any folder that no other reader knows."""

    name: ClassVar[str] = "image-folder"
    fallback: ClassVar[bool] = True

    def recognises(self, path: Path) -> bool:
        return True  # its reader says what is wrong

    def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
        return read_image_folder(path, size, seed)
