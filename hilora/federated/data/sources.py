"""Image sets of other libraries' datasets: torchvision's, Hugging Face's, or any `Dataset` of images and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image
from torch import Tensor

from hilora.errors import FileError, InvalidTypeError, InvalidValueError
from hilora.federated.data.images import ImageSet
from hilora.federated.data.memory import fits
from hilora.federated.data.pixels import to_pixels
from hilora.federated.data.stored import Record, stored, stored_for_now
from hilora.reporting.progress import counted


class Source(Protocol):
    """What `image_set` takes: items by number, each `(image, label, ...)`, or a mapping with columns for these.

    An image is PIL's, a tensor or an array: uint8, or floats in [0, 1]; `[3, h, w]`, grey `[1, h, w]` or `[h, w]`, or
    with the channels last as arrays have them, `[h, w, 3]`. A label is an int from 0 on. Two things that it may have
    beside are used: `classes`, the names of the classes, as torchvision's datasets have it (also that of a `dataset`
    which it is a subset of), and `features`, which say of columns what they are, as those of Hugging Face do.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


def image_set(
    source: Source,
    size: int,
    *,
    name: str,
    classes: Sequence[str] | None = None,
    image: str | None = None,
    label: str | None = None,
    version: str | None = None,
) -> ImageSet:
    """Reads the images of a dataset; each is read once.

        train = image_set(torchvision.datasets.Food101(root, "train"), 224, name="food101")
        test = image_set(datasets.load_dataset("food101", split="validation"), 224, name="food101")

    A dataset should not transform its images at random: what it gives is what all epochs see. Where they would take
    more than half of the memory that is available they are kept on disk (`stored`). There they are found again if a
    `version` tells what they are, or the dataset does, as those of Hugging Face do; else the file ends with the
    process.

    Args:
        source: the dataset; one split of it.
        size: height and width of the result: the shorter side is resized to it, the longer cropped about the centre.
        name: what a run calls the data in its summary.
        classes: names of the classes, in the order of the labels; by default those that the dataset has, or its labels.
        image: the column of the images, where items are mappings; by default the one that is of images.
        label: the column of the labels; by default the only one of classes, or `label`.
        version: another one for everything that changes the images: the data, the split, what transforms them.

    Raises:
        InvalidTypeError: it is no such dataset, or an item is not an image and a label.
        InvalidValueError: `size` is below 1, an image or a label is out of range, or it is not clear which columns are
            meant.
        FileError: an image cannot be read; names its number.
        ResourceError: they fit neither memory nor the disk.
    """
    if size < 1:
        raise InvalidValueError(f"size is {size}, expected at least 1 pixel")
    if not (hasattr(source, "__len__") and hasattr(source, "__getitem__")):
        raise InvalidTypeError(
            f"the dataset {name} is {type(source).__name__}, which has no length or no items by number: give one that "
            "is not a stream"
        )
    reading = _Reading(source, size, name, image, label)
    shape = (len(source), 3, size, size)
    if fits(int(np.prod(shape))):
        pixels = np.empty(shape, np.uint8)
        labels = torch.empty(len(source), dtype=torch.int64)
        for number, (picture, of) in enumerate(reading.records(0)):
            pixels[number], labels[number] = picture, of
        return _checked(torch.from_numpy(pixels), labels, _names(source, classes, reading.label), name)
    made_from = version or getattr(source, "_fingerprint", None)
    if made_from is None:
        images = stored_for_now(shape, reading.records)
    else:
        about = {"version": str(made_from), "columns": f"{reading.image} {reading.label}", "pillow": PIL.__version__}
        key = hashlib.sha256(repr((type(source).__name__, name, size, about["version"])).encode()).hexdigest()[:16]
        images = stored(key, about, shape, reading.records)
    return _checked(images, images.labels(), _names(source, classes, reading.label), name)


class _Reading:
    """The items of a dataset as pixels and labels."""

    def __init__(self, source: Source, size: int, name: str, image: str | None, label: str | None) -> None:
        self.source, self.size, self.name = source, size, name
        features = getattr(source, "features", None)
        features = features if isinstance(features, Mapping) else {}
        pictures = [column for column, feature in features.items() if type(feature).__name__ == "Image"]
        labels = [column for column, feature in features.items() if hasattr(feature, "names")]
        self.image = image or self._only(pictures, "image", "images")
        self.label = label or self._only(labels, "label", "classes")
        self._others = set(features) - {self.image, self.label}

    def _only(self, columns: list[str], usual: str, what: str) -> str:
        if len(columns) > 1:
            raise InvalidValueError(
                f"the dataset {self.name} has several columns of {what}, {', '.join(columns)}: say which, {usual}=…"
            )
        return columns[0] if columns else usual

    def records(self, start: int) -> Iterator[Record]:
        source: Any = self.source
        if self._others and hasattr(source, "remove_columns"):  # they need not be read
            source = source.remove_columns(sorted(self._others))
        for number in counted(range(start, len(source)), len(source), self.name, start):
            where = f"item {number} of the dataset {self.name}"
            try:
                item = source[number]
            except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
                raise FileError(f"{where} cannot be read ({error}): remove or replace it") from error
            picture, label = self._parts(item, where)
            yield self._pixels(picture, where), self._number(label, where)

    def _parts(self, item: Any, where: str) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            if missing := [column for column in (self.image, self.label) if column not in item]:
                said = f"{where} has the columns {', '.join(map(str, item))} and no {' and no '.join(missing)}"
                raise InvalidValueError(f"{said}: say which they are, image=…, label=…")
            return item[self.image], item[self.label]
        if not isinstance(item, tuple | list) or len(item) < 2:
            raise InvalidTypeError(f"{where} is {type(item).__name__}, expected (image, label) or a mapping with these")
        return item[0], item[1]

    def _pixels(self, picture: Any, where: str) -> npt.NDArray[np.uint8]:
        if not isinstance(picture, Image.Image):
            picture = _picture(picture, where)
        try:
            own = picture.copy()  # it is turned in place
            own.format = picture.format
            return to_pixels(own, self.size)
        except Exception as error:  # a damaged file makes Pillow raise nearly anything, when it is decoded here
            raise FileError(f"{where} cannot be read as an image ({error}): remove or replace it") from error

    def _number(self, label: Any, where: str) -> int:
        try:
            number = int(label)
            if number == label and 0 <= number < 2**31:
                return number
        except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
            pass
        raise InvalidValueError(f"{where} has the label {label!r}, expected the number of a class, from 0 on")


def _picture(values: Any, where: str) -> Image.Image:
    """An array as an image of PIL's."""
    if not isinstance(values, Tensor | np.ndarray):
        raise InvalidTypeError(f"{where} has an image of {type(values).__name__}, expected PIL's, a tensor or an array")
    array = torch.as_tensor(values).detach().cpu()
    if array.ndim == 2:
        array = array[None]
    if array.ndim == 3 and array.shape[0] not in (1, 3) and array.shape[2] in (1, 3):
        array = array.permute(2, 0, 1)
    if array.ndim != 3 or array.shape[0] not in (1, 3) or not array.numel():
        shape = list(values.shape)
        raise InvalidValueError(f"{where} has an image {shape}, expected [3, h, w], [1, h, w], [h, w] or [h, w, 3]")
    if array.is_floating_point():
        if not (array >= 0).logical_and(array <= 1).all():  # NaN is neither
            found = f"{float(array.min()):.3g} to {float(array.max()):.3g}"
            raise InvalidValueError(
                f"{where} has floats from {found}, expected 0 to 1: leave out what normalises them, the backbone does"
            )
        array = (array * 255).round().to(torch.uint8)
    if array.dtype != torch.uint8:
        raise InvalidValueError(f"{where} has an image of {array.dtype}, expected uint8, or floats in [0, 1]")
    return Image.fromarray(array.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def _names(source: Any, classes: Sequence[str] | None, label: str) -> tuple[str, ...] | None:
    """Names of the classes, as far as they are known."""
    if classes is not None:
        return tuple(classes)
    features = getattr(source, "features", None)
    if isinstance(features, Mapping) and (names := getattr(features.get(label), "names", None)):
        return tuple(names)
    while not hasattr(source, "classes") and hasattr(source, "dataset"):
        source = source.dataset
    return tuple(map(str, source.classes)) if getattr(source, "classes", None) else None


def _checked(images: Any, labels: Tensor, classes: tuple[str, ...] | None, name: str) -> ImageSet:
    if classes is None:
        classes = tuple(str(label) for label in range(int(labels.max()) + 1)) if len(labels) else ()
    return ImageSet(images, labels, classes, name)
