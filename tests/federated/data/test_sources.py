"""Datasets of other libraries, and of one's own, as image sets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, Subset, TensorDataset

from hilora.errors import FileError, HiLoRAError, InvalidTypeError, InvalidValueError
from hilora.federated.data import sources
from hilora.federated.data.pixels import load_images
from hilora.federated.data.sources import image_set
from hilora.federated.data.stored import StoredImages

RNG = np.random.default_rng(0)
ARRAYS = [RNG.integers(0, 256, (9, 7, 3), np.uint8) for _ in range(6)]
PICTURES = [Image.fromarray(array) for array in ARRAYS]
LABELS = [2, 0, 1, 1, 0, 2]


class Own(Dataset[Any]):
    """Items as they are given; counts what is read."""

    def __init__(self, items: list[Any], **more: Any) -> None:
        self.items, self.read = items, 0
        vars(self).update(more)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.read += 1
        return self.items[index]


class Table(Own):
    """What of `datasets.Dataset` is used; columns that are not wanted cannot be read."""

    def __init__(self, columns: Mapping[str, Any], features: dict[str, Any], fingerprint: str = "one") -> None:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        super().__init__(rows, columns=columns, features=features, _fingerprint=fingerprint)

    def remove_columns(self, names: list[str]) -> Table:
        left = {name: values for name, values in self.columns.items() if name not in names}  # type: ignore[attr-defined]
        return Table(left, self.features)  # type: ignore[attr-defined]


class ClassLabel(SimpleNamespace):
    names: list[str]


PICTURE = type("Image", (), {})()
ANIMALS = ClassLabel(names=["ant", "bee", "cat"])
PAIRS = list(zip(PICTURES, LABELS, strict=True))


@pytest.fixture
def small(monkeypatch, tmp_path: Path) -> Path:
    """Nothing fits memory."""
    monkeypatch.setenv("HILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "fits", lambda size: False)
    return tmp_path / "cache"


def expected(tmp_path: Path, size: int) -> torch.Tensor:
    files = [tmp_path / f"{i}.png" for i in range(len(PICTURES))]
    for picture, file in zip(PICTURES, files, strict=True):
        picture.save(file)
    return load_images(files, size)[:]


def chw(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).permute(2, 0, 1)


@pytest.mark.parametrize(
    "convert",
    [Image.fromarray, np.array, chw, lambda a: chw(a) / 255, lambda a: (a / 255).astype(np.float64), torch.from_numpy],
)
def test_every_form_of_an_image_is_read_as_its_file_is(tmp_path, convert) -> None:
    items = [(convert(array), label) for array, label in zip(ARRAYS, LABELS, strict=True)]
    images = image_set(Own(items), 5, name="own")
    assert torch.equal(images.images[:], expected(tmp_path, 5))
    assert images.labels.tolist() == LABELS
    assert (images.name, images.classes) == ("own", ("0", "1", "2"))


def test_grey_becomes_colour_and_labels_may_be_tensors() -> None:
    for grey in (torch.full((1, 4, 4), 7, dtype=torch.uint8), np.full((4, 4), 7, np.uint8), Image.new("L", (4, 4), 7)):
        images = image_set(Own([(grey, torch.tensor(1), "more")]), 4, name="grey")
        assert (images.images[:] == 7).all()
        assert images.labels.tolist() == [1]


def test_a_picture_is_turned_as_its_camera_was_and_stays_as_it_is(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    PICTURES[0].save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as picture:
        for _ in range(2):
            images = image_set(Own([(picture, 0)]), 5, name="x").images[:]
            assert torch.equal(images, load_images([tmp_path / "x.png"], 5)[:])
        assert picture.getexif()[0x0112] == 3


def test_classes_are_named_by_the_dataset_or_by_hand(tmp_path) -> None:
    named = Own(PAIRS, classes=["a", "b", "c"])
    assert image_set(named, 4, name="x").classes == ("a", "b", "c")
    assert image_set(Subset(named, [1, 2]), 4, name="x").classes == ("a", "b", "c")
    assert image_set(named, 4, name="x", classes=["x", "y", "z", "none"]).classes == ("x", "y", "z", "none")
    with pytest.raises(InvalidValueError, match="labels range over 0 to 2, expected 0 to 1"):
        image_set(named, 4, name="x", classes=["x", "y"])
    assert len(image_set(Own([]), 4, name="none")) == 0


def test_torchvisions_datasets_are_read() -> None:
    torchvision = pytest.importorskip("torchvision")
    fake = torchvision.datasets.FakeData(8, (3, 10, 12), 4)
    tensors = torchvision.datasets.FakeData(8, (3, 10, 12), 4, transform=torchvision.transforms.ToTensor())
    images, again = (image_set(data, 6, name="fake") for data in (fake, tensors))
    assert torch.equal(images.images[:], again.images[:])
    assert images.labels.tolist() == [int(fake[i][1]) for i in range(8)]


def test_a_folder_of_torchvisions_is_that_of_the_reader(tmp_path) -> None:
    torchvision = pytest.importorskip("torchvision")
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        PICTURES["ab".index(name)].save(tmp_path / "data" / name / "x.png")
    images = image_set(torchvision.datasets.ImageFolder(tmp_path / "data"), 5, name="folder")
    files = [tmp_path / "data" / name / "x.png" for name in "ab"]
    assert torch.equal(images.images[:], load_images(files, 5)[:])
    assert images.classes == ("a", "b")


def test_columns_are_found_by_what_they_are(tmp_path) -> None:
    columns = {"img": PICTURES, "text": ["?"] * 6, "kind": LABELS}
    table = Table(columns, {"img": PICTURE, "text": object(), "kind": ANIMALS})
    images = image_set(table, 5, name="table")
    assert torch.equal(images.images[:], expected(tmp_path, 5))
    assert images.classes == ("ant", "bee", "cat")
    assert images.labels.tolist() == LABELS
    assert table.read == 0, "the other columns would have been read"


def test_columns_that_are_not_clear_are_asked_for() -> None:
    columns = {"image": PICTURES, "fine": LABELS, "coarse": [0] * 6}
    table = Table(columns, {"image": PICTURE, "fine": ANIMALS, "coarse": ClassLabel(names=["animal"])})
    with pytest.raises(InvalidValueError, match=r"several columns of classes, fine, coarse: say which, label=…"):
        image_set(table, 5, name="table")
    assert image_set(table, 5, name="table", label="coarse").classes == ("animal",)
    plain = Own([{"image": PICTURES[0], "y": 1}])
    with pytest.raises(InvalidValueError, match=r"columns image, y and no label: say which they are"):
        image_set(plain, 5, name="plain")
    assert image_set(plain, 5, name="plain", label="y").labels.tolist() == [1]


def test_the_real_library(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"img": datasets.Image(), "kind": datasets.ClassLabel(names=ANIMALS.names)})
    table = datasets.Dataset.from_dict({"img": PICTURES, "kind": LABELS}, features=features)
    images = image_set(table, 5, name="table")
    assert torch.equal(images.images[:], expected(tmp_path, 5))
    assert images.classes == ("ant", "bee", "cat")


def test_on_disk_a_version_finds_the_images_again(small: Path, tmp_path) -> None:
    read = []
    for version in ("1", "1", "2", "2"):
        source = Own(PAIRS)
        images = image_set(source, 5, name="own", version=version)
        assert isinstance(images.images, StoredImages)
        assert torch.equal(images.images[:], expected(tmp_path, 5))
        assert images.labels.tolist() == LABELS
        read.append(source.read)
    assert read == [6, 0, 6, 0]


def test_on_disk_a_fingerprint_is_a_version(small: Path) -> None:
    columns, features = {"image": PICTURES, "label": LABELS}, {"image": PICTURE, "label": ANIMALS}
    read = []
    for fingerprint in ("one", "one", "two"):
        table = Table(columns, features, fingerprint)
        image_set(table, 5, name="table")
        read.append(table.read)
    assert read == [6, 0, 6]


def test_on_disk_what_nothing_tells_from_others_is_read_and_leaves_nothing(small: Path, tmp_path) -> None:
    for _ in range(2):
        source = Own(PAIRS)
        images = image_set(source, 5, name="own")
        assert source.read == 6
        assert torch.equal(images.images[:], expected(tmp_path, 5))
        assert images.labels.tolist() == LABELS
        assert list(small.iterdir()) == []


def stream() -> Any:
    yield from PAIRS


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        (stream(), InvalidTypeError, "generator, which has no length or no items by number"),
        (Own([PICTURES[0]]), InvalidTypeError, r"item 0 of the dataset x is Image, expected \(image, label\)"),
        (Own([("a.png", 0)]), InvalidTypeError, "item 0 of the dataset x has an image of str"),
        (Own([(torch.zeros(2, 4, 4), 0)]), InvalidValueError, r"image \[2, 4, 4\], expected \[3, h, w\]"),
        (Own([(torch.zeros(3, 0, 4), 0)]), InvalidValueError, r"image \[3, 0, 4\]"),
        (
            Own([(torch.full((3, 4, 4), -1.0), 0)]),
            InvalidValueError,
            "floats from -1 to -1, .*leave out what normalises",
        ),
        (Own([(torch.full((3, 4, 4), torch.nan), 0)]), InvalidValueError, "floats from nan to nan"),
        (Own([(torch.zeros(3, 4, 4, dtype=torch.int64), 0)]), InvalidValueError, "torch.int64, expected uint8"),
        (Own([PAIRS[0], (PICTURES[1], -1)]), InvalidValueError, "item 1 of the dataset x has the label -1"),
        (Own([(PICTURES[0], 0.5)]), InvalidValueError, "label 0.5, expected the number of a class"),
        (Own([(PICTURES[0], "cat")]), InvalidValueError, "label 'cat'"),
        (Own([(PICTURES[0], torch.tensor([0, 1]))]), InvalidValueError, "label tensor"),
        (TensorDataset(torch.zeros(2, 3, 4, 4)), InvalidTypeError, "item 0 of the dataset x is tuple"),
    ],
)
def test_what_is_no_such_dataset_is_named(source, error, message) -> None:
    with pytest.raises(error, match=message) as refusal:
        image_set(source, 4, name="x")
    assert isinstance(refusal.value, HiLoRAError)


def test_an_item_that_cannot_be_read_is_named(tmp_path, small: Path) -> None:
    PICTURES[0].resize((300, 300)).save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])

    class Files(Own):
        def __getitem__(self, index: int) -> Any:
            return Image.open(self.items[index]).convert("RGB"), 0

    for source in (Own([(Image.open(tmp_path / "x.jpg"), 0)]), Files([tmp_path / "x.jpg"]), Files([tmp_path / "none"])):
        with pytest.raises(FileError, match=r"item 0 of the dataset x cannot be read"):
            image_set(source, 4, name="x", version="1")
    assert list(small.iterdir()) == []
    with pytest.raises(InvalidValueError, match="size is 0"):
        image_set(Own(PAIRS), 0, name="x")
