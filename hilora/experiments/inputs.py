"""What runs are made of: the backbone and the images, read once a process."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, lru_cache
from pathlib import Path

import torch

from hilora.errors import FileError, MissingFileError
from hilora.experiments.experiment import AUTO, DOMAINS, Model, Setting
from hilora.federated.data.glyphs import load_glyphs
from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers import read_domains, read_images
from hilora.federated.engine.device import DTYPES, quick_dtype
from hilora.models.backbone import Backbone, load_backbone

GLYPHS = "glyphs"
DATA_SEED = 0  # of a split that a folder does not have: the images are the same for all seeds of an experiment


class Inputs:
    """The backbone and the images of an experiment, for as many runs as need them.

    Args:
        model: the backbone, and the dtype of its arithmetic.
        root: the folder that paths of weights and data are relative to.
        device: where runs compute.
    """

    def __init__(self, model: Model, root: Path, device: torch.device) -> None:
        self.model, self.root, self.device = model, root, device
        self._read = lru_cache(maxsize=2)(self._images)  # two data sets may take turns

    @cached_property
    def backbone(self) -> Backbone:
        weights = None if self.model.weights is None else self.root / self.model.weights
        return load_backbone(self.model.backbone, weights, self.model.img_size)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What the model asks for, or what is quick here."""
        if self.model.dtype == AUTO:
            return quick_dtype(self.device, self.backbone.features)
        return DTYPES[self.model.dtype]

    def images(self, setting: Setting) -> tuple[ImageSet, ImageSet]:
        """Training and test images of a setting.

        Raises:
            FileError: they cannot be read.
        """
        return self._read(setting.data, setting.scheme == DOMAINS, setting.classes)

    def _images(self, data: str, domains: bool, classes: int | None) -> tuple[ImageSet, ImageSet]:
        if data == GLYPHS:
            return load_glyphs(DATA_SEED)
        path, size = self.root / data, self.backbone.size
        try:
            return read_domains(path, size, DATA_SEED, classes) if domains else read_images(path, size, DATA_SEED)
        except OSError as error:  # of this data alone: other settings can go on
            raise FileError(f"the data {data} cannot be read: {error}") from error


def check_files(model: Model, settings: Iterable[Setting], root: Path) -> None:
    """Sees that the weights and the settings' data are there before hours are spent.

    Raises:
        MissingFileError: naming what is not.
    """
    needed = [setting.data for setting in settings if setting.data != GLYPHS]
    needed += [model.weights] if model.weights else []
    missing = [name for name in dict.fromkeys(needed) if not (root / name).exists()]
    if missing:
        raise MissingFileError(f"{root} does not hold {', '.join(missing)}: give the folder that does by --data-dir")
