"""Images on disk: what a tensor of them would give, found again, and never trusted."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hilora.errors import FileError, HiLoRAError, ResourceError
from hilora.federated.data import pixels, stored
from hilora.federated.data.images import ImageSet
from hilora.federated.data.pixels import load_images
from hilora.federated.data.readers import read_domains, read_images
from hilora.federated.data.stored import StoredImages

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 5), np.uint8)
LABELS = torch.arange(12) % 5


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the cache; nothing fits memory."""
    folder = tmp_path / "made" / "cache"
    monkeypatch.setenv("HILORA_CACHE", str(folder))
    monkeypatch.setattr(pixels, "fits", lambda size: False)
    return folder


def make(about: str = "a", stop: int = 12, starts: list[int] | None = None, wrong: Exception | None = None):
    def records(start: int) -> Iterator[tuple[np.ndarray, int]]:
        if starts is not None:
            starts.append(start)
        for number in range(start, 12):
            if number == stop:
                raise wrong or KeyboardInterrupt
            yield PIXELS[number], int(LABELS[number])

    return stored.stored("name", {"from": about}, (12, 3, 4, 5), records)


def folder_of(root: Path, *classes: str, count: int = 5) -> Path:
    rng = np.random.default_rng(1)
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.mark.parametrize(
    "index",
    [
        torch.tensor([3, 0, 3, 11]),
        torch.tensor([[5, 1], [1, -1]]),
        torch.tensor([], dtype=torch.int64),
        torch.tensor([[], []], dtype=torch.int64),
        torch.arange(12) > 8,
        slice(None),
        slice(7, 2),
        slice(1, None, 4),
        torch.tensor(2),
        4,
        -1,
    ],
)
def test_an_index_gives_what_it_gives_of_a_tensor(index) -> None:
    images, tensor = make(), torch.from_numpy(PIXELS)
    assert torch.equal(images[index], tensor[index])
    assert images[index].dtype == images.dtype
    assert images.shape == tensor.shape
    assert len(images) == 12


def test_what_is_not_there_is_an_error_and_ends_a_loop() -> None:
    images = make()
    with pytest.raises(IndexError):
        images[torch.tensor([12])]
    assert sum(1 for _ in images) == 12
    assert torch.equal(images.labels(), LABELS)


def test_it_is_made_once_and_anew_from_something_else(cache: Path) -> None:
    starts: list[int] = []
    for about in ("a", "a", "b", "b", "a"):
        assert torch.equal(make(about, starts=starts)[:], torch.from_numpy(PIXELS))
        assert [file.suffix for file in cache.iterdir()] == [".images"]
    assert starts == [0, 0, 0], "a, b, and a again"


def test_what_is_interrupted_goes_on_where_it_stopped(cache: Path) -> None:
    starts: list[int] = []
    for stop in (5, 9):
        with pytest.raises(KeyboardInterrupt):
            make(stop=stop, starts=starts)
    assert [file.suffix for file in cache.iterdir()] == [".part"]
    assert torch.equal(make(starts=starts)[:], torch.from_numpy(PIXELS))
    assert starts == [0, 5, 9]
    assert [file.suffix for file in cache.iterdir()] == [".images"]


def test_a_beginning_is_checked_and_one_of_other_images_is_removed(cache: Path) -> None:
    starts: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        make(stop=8)
    (part,) = cache.iterdir()
    content = bytearray(part.read_bytes())
    content[-5 * (len(content) // 8)] ^= 1  # in the fourth or so
    part.write_bytes(content + b"a torn write")
    with pytest.raises(KeyboardInterrupt):
        make(stop=6, starts=starts)
    assert 0 < starts[0] < 6
    with pytest.raises(KeyboardInterrupt):
        make("b", stop=3, starts=starts)
    assert starts[1:] == [0]
    assert len(list(cache.iterdir())) == 1


def test_nothing_is_left_of_images_that_cannot_be_read(cache: Path) -> None:
    with pytest.raises(FileError, match="broken"):
        make(stop=3, wrong=FileError("broken"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("place", [-1, -60, -61, -65, -70])  # pixels of the last, and what stands before them
def test_a_flipped_bit_is_found_where_it_is_read(cache: Path, place: int) -> None:
    make()
    (file,) = cache.iterdir()
    content = bytearray(file.read_bytes())
    content[place] ^= 4
    file.write_bytes(content)
    images = make()
    assert torch.equal(images[:11], torch.from_numpy(PIXELS[:11]))
    with pytest.raises(FileError, match=r"name.images is damaged, image 11 .*: remove it"):
        images[11]
    if place < -60:
        with pytest.raises(FileError, match="image 11"):
            images.labels()


@pytest.mark.parametrize("change", ["cut", "longer", "empty", "foreign", "shape", "json", "deep"])
def test_a_file_that_is_not_what_it_should_be_is_made_anew(cache: Path, change: str) -> None:
    make()
    (file,) = cache.iterdir()
    content = file.read_bytes()
    changed = {
        "cut": content[:-1],
        "longer": content + b"\0",
        "empty": b"",
        "foreign": b"hilora-images-9" + content[15:],
        "shape": content.replace(b"12x3x4x5", b"12x1x4x5"),
        "json": stored.MAGIC + b"[1]\n",
        "deep": stored.MAGIC + b"[" * 60000 + b"\n",
    }[change]
    file.write_bytes(changed)
    with pytest.raises(FileError, match="remove it"):
        StoredImages.open(file)
    assert torch.equal(make()[:], torch.from_numpy(PIXELS))
    assert file.read_bytes() == content


def test_it_goes_on_where_its_file_is_replaced_and_in_copies_and_other_processes(cache: Path) -> None:
    images = make()
    again = pickle.loads(pickle.dumps(images))
    make("b")
    for one in (images, again, copy.deepcopy(images)):
        assert torch.equal(one[:], torch.from_numpy(PIXELS))


def test_two_that_make_the_same_at_once_both_have_it(cache: Path) -> None:
    def records(start: int) -> Iterator[tuple[np.ndarray, int]]:
        for number in range(start, 12):
            if number == 6:
                assert torch.equal(make()[:], torch.from_numpy(PIXELS))
            yield PIXELS[number], int(LABELS[number])

    images = stored.stored("name", {"from": "a"}, (12, 3, 4, 5), records)
    assert torch.equal(images[:], torch.from_numpy(PIXELS))
    assert [file.suffix for file in cache.iterdir()] == [".images"]


def test_a_disk_that_is_full_is_said_before_and_while_it_is_written(cache: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 100})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: usage)
        with pytest.raises(ResourceError, match=r"need .* GB where .*cache has room for .*HILORA_CACHE"):
            make()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    code = f"""
import resource, signal
import numpy as np
from hilora.errors import ResourceError
from hilora.federated.data.stored import stored
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, {before[1]}))
try:
    stored("x", {{}}, (99, 3, 99, 99), lambda start: ((np.zeros((3, 99, 99), np.uint8), 0) for _ in range(start, 99)))
except ResourceError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ))
    assert "images cannot be kept in" in done.stdout, done.stderr
    assert "let HILORA_CACHE name a folder elsewhere" in done.stdout


def test_readers_give_the_same_from_disk_and_from_memory(tmp_path: Path, cache: Path, monkeypatch) -> None:
    folder = folder_of(tmp_path / "data", "a", "b")
    for name in ("photo", "sketch"):
        folder_of(tmp_path / "domains" / name, "a", "b")
    read = [read_images(folder, 6, 0), read_domains(tmp_path / "domains", 6, 0)]
    monkeypatch.setattr(pixels, "fits", lambda size: True)
    kept = [read_images(folder, 6, 0), read_domains(tmp_path / "domains", 6, 0)]
    for one, other in zip(sum(read, ()), sum(kept, ()), strict=True):
        assert isinstance(one.images, StoredImages)
        assert isinstance(other.images, torch.Tensor)
        assert torch.equal(one.images[:], other.images)
        assert torch.equal(one.checksums(), other.checksums())
        assert len(set(one.checksums().tolist())) == len(one)
        assert torch.equal(one.labels, other.labels)
        assert one.to(torch.device("cpu")) is one
    assert len(list(cache.iterdir())) == 4


def test_images_that_changed_are_read_again(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "data", "a")
    files = sorted((folder / "a").iterdir())
    first = load_images(files, 6)
    Image.new("RGB", (9, 7), (9, 9, 9)).save(files[2])
    os.utime(files[2], ns=(1, 1))
    second = load_images(files, 6)
    assert (second[2] == 9).all()
    assert not (first[2] == 9).all(), "what is open stays as it was"
    assert torch.equal(first[:2], second[:2])


def test_checksums_tell_images_and_their_places_apart() -> None:
    def sums(values: np.ndarray) -> torch.Tensor:
        return ImageSet(torch.from_numpy(values), LABELS, tuple("abcde"), "x").checksums()

    changed = PIXELS.copy()
    changed[3, 0, 0, 0] ^= 1
    assert (sums(PIXELS) != sums(changed)).nonzero().tolist() == [[3]]
    assert not (sums(PIXELS) == sums(PIXELS[::-1].copy())).any()
    assert torch.equal(sums(PIXELS), make().checksums())


def test_the_cache_is_where_it_is_said_to_be(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for said, folder in (("", ".cache/hilora"), ("~/x", "x")):
        monkeypatch.setenv("HILORA_CACHE", said)
        assert stored.cache_folder() == tmp_path / folder
    monkeypatch.setenv("HILORA_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(HiLoRAError, match=r"images cannot be kept in .*File exists.*HILORA_CACHE"):
        make()
