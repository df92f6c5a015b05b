"""A partition and a reader are one new file each, in their folder or outside of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field, ValidationError

import hilora
from hilora.errors import HiLoRAError, InvalidTypeError, InvalidValueError
from hilora.federated.data import partitions, readers
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Partition, PartitionError, Population, partition
from hilora.federated.data.partitions.gl_dir import GlDir
from hilora.federated.data.readers import Reader, read_images
from tests.federated.data.test_partition import TEST, TRAIN

PARTITION = """
from typing import ClassVar
import torch
from pydantic import Field
from hilora.federated.data.partitions.base import Client, Partition, Population

class Slices(Partition):
    name: ClassVar[str] = "slices"
    clients: int = Field(ge=1, description="how many there are")
    gap: int = Field(default=0, ge=0, description="images left out between clients")

    def divide(self, train, test, seed):
        starts = range(0, len(train), len(train) // self.clients)
        rows = [torch.arange(start, start + len(train) // self.clients - self.gap) for start in starts]
        none = torch.arange(0)
        return Population(tuple(Client(own, none, own, None, True) for own in rows), self.name, ())
"""
READER = """
from typing import ClassVar
import torch
from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers.base import Reader

class Tensors(Reader):
    name: ClassVar[str] = "tensors"

    def recognises(self, path):
        return (path / "images.pt").is_file()

    def read(self, path, size, seed):
        images = torch.load(path / "images.pt", weights_only=True)
        both = ImageSet(images, torch.zeros(len(images), dtype=torch.int64), ("all",), "tensors")
        return both, both
"""
USE = """
import sys
import torch
from hilora.federated.data.partitions import PARTITIONS, partition
from hilora.federated.data.readers import READERS, read_images

torch.save(torch.zeros(12, 3, 1, 1, dtype=torch.uint8), sys.argv[1] + "/images.pt")
train, test = read_images(sys.argv[1], 1, 0)
assert train.name == "tensors" and "tensors" in READERS
population = partition(train, test, "slices", clients=3, gap=1, unseen=0.5, seed=0)
assert [client.train.tolist() for client in population.clients] == [[0, 1, 2], [4, 5, 6], [8, 9, 10]]
assert list(PARTITIONS["slices"].model_fields) == ["clients", "gap"]
"""


def test_one_new_file_is_all_that_a_partition_or_a_reader_needs(tmp_path: Path) -> None:
    source = Path(hilora.__file__).parent
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(source, tmp_path / "hilora", ignore=skip)  # the link to the kernels becomes a folder
    data = tmp_path / "hilora" / "federated" / "data"
    (data / "partitions" / "slices.py").write_text(PARTITION)
    (data / "readers" / "tensors.py").write_text(READER)
    images = tmp_path / "images"
    (images / "class").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", USE, str(images)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class Halves(Partition):
    """Two clients, of which the second has what the first does not."""

    name: ClassVar[str] = "halves"
    first: float = Field(default=0.5, gt=0, lt=1, description="the first one's share")

    def divide(self, train: ImageSet, test: ImageSet, seed: int) -> Population:
        cut = round(self.first * len(train))
        rows = torch.arange(len(train)).split([cut, len(train) - cut])
        none = torch.arange(0)
        return Population(tuple(Client(own, none, torch.arange(5), None, True) for own in rows), self.name, ())


def test_a_class_from_elsewhere_is_taken_as_it_is() -> None:
    population = partition(TRAIN, TEST, Halves, first=0.1, alpha=3, seed=0)
    assert [len(client.train) for client in population.clients] == [100, 900]
    population = partition(TRAIN, TEST, Halves(first=0.3), seed=0)
    assert [len(client.train) for client in population.clients] == [300, 700]
    with pytest.raises(PartitionError, match="first beside a partition that has its settings"):
        partition(TRAIN, TEST, Halves(), first=0.3, seed=0)


def test_a_registered_class_is_known_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partitions, "PARTITIONS", dict(partitions.PARTITIONS))
    with pytest.raises(PartitionError, match="scheme is 'halves', expected one of domains, gl-dir"):
        partition(TRAIN, TEST, "halves", seed=0)
    assert partitions.register(Halves) is Halves
    assert partition(TRAIN, TEST, "halves", seed=0).scheme == "halves"
    assert partitions.register(Halves) is Halves, "twice is once"

    class Other(Halves):
        pass

    with pytest.raises(InvalidValueError, match=r"Other is called 'halves', as .*Halves is: give it another name"):
        partitions.register(Other)


def test_what_is_no_partition_is_refused():
    class Unnamed(Halves):
        name: ClassVar[str] = ""

    class Unfinished(Partition):
        name: ClassVar[str] = "unfinished"

    cases: list[tuple[Any, type[Exception], str]] = [
        (Unnamed, InvalidValueError, "Unnamed.name is ''"),
        (Unfinished, InvalidTypeError, "Unfinished lacks divide"),
        (ImageSet, InvalidTypeError, "not a class derived from Partition"),
        (5, InvalidTypeError, "5 is not a class derived from Partition"),
    ]
    for wrong, error, message in cases:
        for take in (partitions.register, lambda kind: partition(TRAIN, TEST, kind, seed=0)):
            with pytest.raises(error, match=message) as refusal:
                take(wrong)
            assert isinstance(refusal.value, HiLoRAError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"first": 1.0}, "first is 1.0, expected below 1"),
        ({"first": 0}, "first is 0, expected a positive number"),
        ({"first": "much"}, "first is 'much', expected a valid number"),
        ({"first": float("nan")}, "first is nan, expected a finite number"),
        ({"firts": 0.2}, "firts is 0.2, which halves does not know: leave it out"),
        ({"first": 1.0, "second": 2}, "first is 1.0, .*; second is 2, which"),
    ],
)
def test_settings_are_checked_wherever_they_come_from(settings, message) -> None:
    for make in (lambda: Halves(**settings), lambda: partition(TRAIN, TEST, Halves, **settings, seed=0)):
        with pytest.raises(PartitionError, match=message) as refusal:
            make()
        assert isinstance(refusal.value.__cause__, ValidationError)


def test_every_setting_of_every_partition_is_described() -> None:
    for name, fields in partitions.settings().items():
        for field in fields:
            assert field.description, name
            assert "\n" not in field.description
    alphas = {
        name: kind.model_fields["alpha"].default for name, kind in partitions.PARTITIONS.items() if name != "patho"
    }
    assert alphas == {"gl-dir": 0.3, "sc-dir": 3.0, "domains": 0.6}
    with pytest.raises(PartitionError, match="clients is missing, gl-dir needs it"):
        GlDir(**{})


def rows(*indices: int) -> torch.Tensor:
    return torch.tensor(indices, dtype=torch.int64)


@pytest.mark.parametrize(
    ("clients", "groups", "message"),
    [
        ([Client(rows(1, 2), rows(2), rows(0), None, True)], (), r"training images \[2\] have several owners"),
        ([Client(rows(1000), rows(2), rows(0), None, True)], (), "train of client 0 is .*, indices into 1000"),
        ([Client(rows(1), rows(2), rows(-1), None, True)], (), "test of client 0 is"),
        ([Client(rows(1), rows(2).float(), rows(3), None, True)], (), "val of client 0 is torch.float32"),
        ([Client(rows(1), rows(2), rows(3), None, False)], (), "no client takes part in training"),
        ([Client(rows(1), rows(2), rows(3), 0, True)], (), "groups of clients are .0., expected None"),
        ([Client(rows(1), rows(2), rows(3), 1, True)], ("a",), "groups of clients are .1., expected an index"),
    ],
)
def test_what_a_partition_of_ones_own_returns_is_checked(clients, groups, message) -> None:
    class Wrong(Partition):
        name: ClassVar[str] = "wrong"

        def divide(self, train: ImageSet, test: ImageSet, seed: int) -> Population:
            return Population(tuple(clients), self.name, groups)

    with pytest.raises(PartitionError, match=f"wrong: .*{message}"):
        partition(TRAIN, TEST, Wrong, seed=0)


def test_a_reader_from_elsewhere_goes_before_the_image_folder(tmp_path, monkeypatch) -> None:
    class Known(Reader):
        name: ClassVar[str] = "known"

        def recognises(self, path: Path) -> bool:
            return (path / "mark").exists()

        def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
            return TRAIN, TEST

    class Rival(Known):
        name: ClassVar[str] = "rival"

    monkeypatch.setattr(readers, "READERS", dict(readers.READERS))
    (tmp_path / "mark").touch()
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path, 8, 0)
    assert readers.register(Known) is Known
    assert read_images(tmp_path, 8, 0) == (TRAIN, TEST)
    readers.register(Rival)
    with pytest.raises(InvalidValueError, match="is data of known and rival: keep one of them there"):
        read_images(tmp_path, 8, 0)
