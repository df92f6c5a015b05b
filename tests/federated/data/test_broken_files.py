"""Files that cannot be read are named, however they are broken; nothing hangs, and memory is bounded."""

from __future__ import annotations

import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hilora.errors import FileError, HiLoRAError
from hilora.federated.data import pixels
from hilora.federated.data.pixels import load_images
from hilora.federated.data.readers import read_images

pytestmark = pytest.mark.slow


def save(path: Path, size: int = 40) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(path)
    return path.read_bytes()


def bomb(side: int, mode: int = 2, bits: int = 8) -> bytes:
    """A PNG of black, `side` x `side`, in a few kilobytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" * (1 + side * {0: 1, 2: 3, 6: 4}[mode] * bits // 8)
    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(row) for _ in range(side)) + packer.flush()
    head = struct.pack(">IIBBBBB", side, side, bits, mode, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def breaks(folder: Path) -> dict[str, str]:
    """Broken files in a folder, and what is said of each."""
    whole = save(folder / "whole.jpg")
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cut.png").write_bytes(save(folder / "whole.png")[:-2000])
    (folder / "empty.jpg").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "loop.jpg").symlink_to(folder / "pool.jpg")
    (folder / "pool.jpg").symlink_to(folder / "loop.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "bomb.png").write_bytes(bomb(10_000))
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "empty.jpg": "it is empty, it has 0 bytes",
        "text.jpg": "it is none of JPEG, PNG",
        "loop.jpg": "symbolic links",
        "pool.jpg": "symbolic links",
        "gone.jpg": "No such file",
        "bomb.png": "it has more than 89478485 pixels, make it smaller or raise PIL.Image.MAX_IMAGE_PIXELS",
    }


@pytest.mark.parametrize("memory", [True, False])
def test_all_that_is_broken_is_named_with_its_reason(tmp_path, monkeypatch, memory: bool) -> None:
    monkeypatch.setenv("HILORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pixels, "fits", lambda size: memory)
    said = breaks(tmp_path / "data")
    files = sorted((tmp_path / "data").iterdir())
    with pytest.raises(FileError, match=r"^8 files cannot be read as images, remove or replace them:") as refusal:
        load_images(files, 8)
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == 8
    for (name, reason), line in zip(sorted(said.items()), lines, strict=True):
        assert f"data/{name}: " in line
        assert reason in line
    for name, reason in said.items():
        with pytest.raises(FileError) as refusal:
            load_images([tmp_path / "data" / "whole.jpg", tmp_path / "data" / name], 8)
        assert str(refusal.value).startswith(f"{tmp_path / 'data' / name} cannot be read as an image: ")
        assert reason in str(refusal.value)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def test_of_many_ten_are_named_and_the_first_at_once(tmp_path, caplog) -> None:
    for i in range(30):
        (tmp_path / "a").mkdir(exist_ok=True)
        (tmp_path / "a" / f"{i:02}.jpg").touch()
    with pytest.raises(FileError, match=r"10 files \(there may be more\)") as refusal:
        load_images(sorted((tmp_path / "a").iterdir()), 8)
    assert str(refusal.value).count(".jpg: ") == 10
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path / 'a' / '00.jpg'} cannot be read as an image; looking for others"
    ]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch) -> None:
    save(tmp_path / "x.png")

    def refuse(*args: object, **more: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "x.png"))

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(FileError, match=r"x.png cannot be read as an image: .*Permission denied"):
        load_images([tmp_path / "x.png"], 8)


def test_a_limit_of_pixels_that_was_raised_counts(tmp_path, monkeypatch) -> None:
    save(tmp_path / "x.png", 40)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(FileError, match="more than 1000 pixels"):
        load_images([tmp_path / "x.png"], 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert load_images([tmp_path / "x.png"], 8).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("mode", "bits"), [(6, 8), (0, 16)])
def test_the_largest_images_stay_within_two_gigabytes(tmp_path, mode: int, bits: int) -> None:
    (tmp_path / "x.png").write_bytes(bomb(9400, mode, bits))
    code = "import sys; from pathlib import Path; from hilora.federated.data.pixels import load_images; "
    code += "load_images([Path(sys.argv[1])], 8); print(Path('/proc/self/status').read_text())"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.png")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    most = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)  # of this program; ru_maxrss begins with that of its parent
    assert most is not None
    assert 300 < int(most[1]) / 1024 < 2000


def test_what_there_is_no_memory_for_is_named(tmp_path) -> None:
    (tmp_path / "x.png").write_bytes(bomb(7000))
    code = f"""
import resource
from pathlib import Path
import torch
from hilora.errors import FileError
from hilora.federated.data.pixels import load_images
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * {resource.getpagesize()} + 2**27, resource.RLIM_INFINITY))
try:
    load_images([Path({str(tmp_path / "x.png")!r})], 8)
except FileError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "x.png cannot be read as an image: there is too little memory for it" in done.stdout, done.stderr


def test_classes_of_one_image_and_of_none(tmp_path) -> None:
    for i in range(5):
        save(tmp_path / "many" / f"{i}.png")
    save(tmp_path / "one" / "x.png")
    train, test = read_images(tmp_path, 8, 0)
    assert train.classes == test.classes == ("many", "one")
    assert torch.bincount(train.labels, minlength=2).tolist() == [4, 1]
    assert torch.bincount(test.labels, minlength=2).tolist() == [1, 0]
    (tmp_path / "none").mkdir()
    with pytest.raises(HiLoRAError, match=r"the classes \['none'\] have no images .*remove or fill them"):
        read_images(tmp_path, 8, 0)


def test_folders_that_lead_back_to_themselves_are_named(tmp_path) -> None:
    save(tmp_path / "a" / "x.png")
    save(tmp_path / "a" / "y.png")
    (tmp_path / "a" / "back").symlink_to(tmp_path)
    assert len(read_images(tmp_path, 8, 0)[0]) == 1
    (tmp_path / "b").symlink_to(tmp_path / "b")
    with pytest.raises(HiLoRAError, match="b: a link that leads nowhere, or back to itself"):
        read_images(tmp_path, 8, 0)
