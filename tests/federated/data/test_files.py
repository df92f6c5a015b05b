"""Folders and image files as people have them."""

from __future__ import annotations

import os
import threading
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hilora.errors import FileError, HiLoRAError
from hilora.federated.data.pixels import FORMATS, SUFFIXES, load_images
from hilora.federated.data.readers import read_domains, read_images
from hilora.federated.data.readers.domains import Domains

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n(MARKER) = \n%%EOF\n"


def save(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (6, 6), (shade, 0, 0)).save(path)


def fill(root: Path, *classes: str, count: int = 5) -> Path:
    for name in classes:
        for i in range(count):
            save(root / name / f"{i}.png", i)
    return root


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_postscript_reaches_no_interpreter_whatever_it_is_called(tmp_path, monkeypatch, suffix) -> None:
    proof = tmp_path / "proof"
    (tmp_path / "bin").mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        stand_in = tmp_path / "bin" / name
        stand_in.write_text(f'#!/bin/sh\necho ran >> {proof}\n[ "$1" = --version ] && echo 10.0\n')
        stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    file = tmp_path / f"x{suffix}"
    file.write_bytes(EPS)
    with pytest.raises(FileError, match=rf"x{suffix} cannot be read as an image: it is none of JPEG, PNG"):
        load_images([file], 8)
    assert not proof.exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "ICO", "PCX", "SGI", "DDS", "PDF"])
def test_formats_that_are_not_named_are_not_opened(tmp_path, kind) -> None:
    assert kind not in FORMATS
    Image.new("RGB", (16, 16)).save(tmp_path / "x.jpg", format=kind)
    with pytest.raises(FileError, match=r"x.jpg cannot be read as an image"):
        load_images([tmp_path / "x.jpg"], 8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_all_named_formats_are_read_also_under_anothers_name(tmp_path, suffix) -> None:
    picture = Image.new("RGB", (8, 8), (200, 60, 20))
    picture.save(tmp_path / f"right{suffix}")
    wrong = (tmp_path / f"right{suffix}").rename(tmp_path / "wrong.png") if suffix != ".png" else None
    picture.save(tmp_path / f"right{suffix}")
    files = [tmp_path / f"right{suffix}", *([wrong] if wrong else [])]
    means = load_images(files, 8)[:].float().mean((2, 3))
    assert ((means - torch.tensor([200.0, 60.0, 20.0])).abs() < 8).all()


def test_pictures_of_two_cameras_in_one_file_are_read(tmp_path) -> None:
    first, second = Image.new("RGB", (8, 8), (200, 60, 20)), Image.new("RGB", (8, 8))
    first.save(tmp_path / "x.jpg", format="MPO", save_all=True, append_images=[second])
    assert load_images([tmp_path / "x.jpg"], 8)[0][0].float().mean() > 190


def test_pipes_devices_and_folders_are_named_and_not_opened(tmp_path) -> None:
    fill(tmp_path, "cat", "dog")
    odd = tmp_path / "cat" / "x.jpg"
    for make in (lambda: os.mkfifo(odd), lambda: odd.symlink_to("/dev/zero"), odd.mkdir):
        make()
        said: list[Exception] = []

        def read() -> None:
            try:
                read_images(tmp_path, 8, 0)
            except HiLoRAError as error:
                said.append(error)  # noqa: B023

        reading = threading.Thread(target=read, daemon=True)
        reading.start()
        reading.join(30)
        assert not reading.is_alive(), "it hangs"
        assert "x.jpg cannot be read as an image: it is a folder, a pipe or a device" in str(said[0])
        odd.rmdir() if odd.is_dir() else odd.unlink()


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_grey_of_16_bits_is_scaled(tmp_path, suffix) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint16), (256, 1))
    Image.fromarray(ramp.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(ramp * 257).save(tmp_path / f"16.{suffix}")
    eight, sixteen = load_images([tmp_path / "8.png", tmp_path / f"16.{suffix}"], 256)[:]
    assert torch.equal(eight, sixteen)


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_values_of_no_known_range_are_refused(tmp_path, dtype) -> None:
    Image.fromarray(np.ones((8, 8), dtype)).save(tmp_path / "x.tif")
    with pytest.raises(FileError, match=r"x.tif cannot be read .* no known range, expected 8 or 16 bits"):
        load_images([tmp_path / "x.tif"], 8)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGBA", "png"), ("RGBA", "webp"), ("RGBA", "gif"), ("RGBA", "tif"), ("LA", "png"), ("P", "png"), ("P", "gif")],
)
def test_transparent_pixels_are_laid_on_white(tmp_path, mode, suffix) -> None:
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[4:12, 4:12, 3] = 255  # black ink on black that is transparent, as most programs write it
    if mode == "P":
        picture = Image.fromarray(ink[..., 3] // 255)
        picture.putpalette([0] * 6)
        picture.info["transparency"] = 0
    else:
        picture = Image.fromarray(ink).convert(mode)
    picture.save(tmp_path / f"x.{suffix}", lossless=True)
    with Image.open(tmp_path / f"x.{suffix}") as image:
        assert image.mode == mode or suffix == "gif"
    expected = torch.full((3, 16, 16), 255, dtype=torch.uint8)
    expected[:, 4:12, 4:12] = 0
    assert torch.equal(load_images([tmp_path / f"x.{suffix}"], 16)[0], expected)


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_stay(tmp_path) -> None:
    colours = torch.randint(256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for alpha, tolerance in ((255, 0), (128, 2)):
        rgba = np.concatenate([colours.numpy(), np.full((1, 16, 16), alpha, np.uint8)]).transpose(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(rgba)).save(tmp_path / "x.png")
        mixed = 255 + (colours.float() - 255) * alpha / 255
        assert (load_images([tmp_path / "x.png"], 16)[0].float() - mixed).abs().max() <= tolerance


def test_pictures_that_are_passed_over_are_counted(tmp_path) -> None:
    fill(tmp_path, "cat", "dog")
    fill(tmp_path / "cat", "more", ".thumbs", "@eaDir", count=3)
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    for name in ("0.heic", "1.HEIC", "0.svg", ".2.heic"):
        (tmp_path / "dog" / name).touch()
    said = r"6 pictures are passed over \(2 .heic, 1 .svg, 3 in folders below a class\); only files .jpg"
    with pytest.warns(UserWarning, match=said):
        train, test = read_images(tmp_path, 6, 0)
    assert len(train) + len(test) == 10


def test_a_class_with_pictures_below_it_only_says_where_they_are(tmp_path) -> None:
    fill(tmp_path, "cat")
    fill(tmp_path / "dog", "2020")
    with pytest.raises(FileError, match=r"\['dog'\] have no images .*; pictures lie in folders below dog, move"):
        read_images(tmp_path, 6, 0)


def test_a_clean_folder_warns_of_nothing(tmp_path) -> None:
    fill(tmp_path, "cat", "dog")
    (tmp_path / "cat" / "notes.txt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_images(tmp_path, 6, 0)


def test_what_systems_leave_behind_is_no_class(tmp_path) -> None:
    fill(tmp_path, "cat", "dog")
    for name in ("__MACOSX", "@eaDir", ".cache", "$RECYCLE.BIN", "System Volume Information", "lost+found"):
        fill(tmp_path, name)
        (tmp_path / "empty" / name).mkdir(parents=True)
    for name in (".DS_Store", "Thumbs.db", "._0.png"):
        (tmp_path / "cat" / name).write_bytes(b"\0\5\x16\7")
    fill(tmp_path / "empty", "cat", "dog", count=1)
    assert read_images(tmp_path / "empty", 6, 0)[0].classes == ("cat", "dog")
    (tmp_path / "empty").rename(tmp_path / ".empty")
    train, test = read_images(tmp_path, 6, 0)
    assert train.classes == ("cat", "dog")
    assert len(train) + len(test) == 10


NFC, NFD = "caf\u00e9", unicodedata.normalize("NFD", "caf\u00e9")


@pytest.mark.parametrize(
    ("pair", "how"), [((NFC, NFD), "form"), (("Cat", "cat"), "case"), (("STRASSE", "stra\u00dfe"), "case")]
)
def test_classes_that_some_systems_take_for_one_are_named(tmp_path, pair, how) -> None:
    message = rf"classes .* and .* differ in {how} only.*: merge them, or rename one"
    fill(tmp_path / "one", *pair)
    if len(list((tmp_path / "one").iterdir())) == 1:
        pytest.skip("they are one to this system")
    with pytest.raises(FileError, match=message):
        read_images(tmp_path / "one", 6, 0)
    fill(tmp_path / "parts" / "train", pair[0])
    fill(tmp_path / "parts" / "test", pair[1])
    with pytest.raises(FileError, match=message):
        read_images(tmp_path / "parts", 6, 0)
    fill(tmp_path / "many" / "photo", pair[0], "dog")
    fill(tmp_path / "many" / "sketch", pair[1], "dog")
    with pytest.raises(FileError, match=message):
        read_domains(tmp_path / "many", 6, 0)


def test_domains_are_recognised_and_a_split_is_not_taken_for_them(tmp_path) -> None:
    for domain in ("photo", "sketch"):
        fill(tmp_path / "many" / domain, "cat", "dog")
    fill(tmp_path / "many", "__MACOSX")
    train, _ = read_images(tmp_path / "many", 6, 0)
    assert train.domain_names == ("photo", "sketch")
    assert train.name == "many (2 domains)"
    for parts in (("train", "test"), ("train", "valid"), ("Training", "Extra")):
        root = tmp_path / "-".join(parts)
        for part in parts:
            fill(root / part, "cat", "dog")
        assert not Domains().recognises(root)
    assert not Domains().recognises(fill(tmp_path / "flat", "cat", "dog"))
    assert not Domains().recognises(tmp_path / "many" / "photo" / "cat")
    assert not Domains().recognises(tmp_path / "nowhere")


def test_glyphs_are_read_by_their_name_unless_a_folder_has_it(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_images("glyphs", 8, 0)[0].name == "glyphs"
    fill(tmp_path / "glyphs", "a", "b")
    assert read_images("glyphs", 8, 0)[0].name == "glyphs (image folder)"
