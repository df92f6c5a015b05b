from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers import read_domains

COUNTS = {"clipart": {"cat": 10, "dog": 8}, "real": {"cat": 20, "dog": 2, "emu": 6}, "sketch": {"emu": 1, "cat": 3}}


def save(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images without lists: red is the number of the file, and no two of a domain and class are alike."""
    root = tmp_path / "many"
    for domain, classes in COUNTS.items():
        for name, count in classes.items():
            for i in range(count):
                save(root / domain / name / f"{i:02}.png", i)
    return root


def write_lists(root: Path) -> None:
    """Lists as DomainNet has them: labels are not those by name, and every third image is for the test."""
    labels = {"emu": 0, "cat": 3, "dog": 5}
    for domain, classes in COUNTS.items():
        lines = [
            (i % 3 == 2, f"{domain}/{name}/{i:02}.png {labels[name]}\n")
            for name, count in classes.items()
            for i in reversed(range(count))
        ]
        for part, wanted in (("train", False), ("test", True)):
            (root / f"{domain}_{part}.txt").write_text("".join(line for is_test, line in lines if is_test == wanted))
    (root / "sketch_test.txt").write_text("sketch/cat/02.png 3\n\n")


def cells(images: ImageSet) -> dict[tuple[str, str], list[int]]:
    """The numbers of the files in each domain and class, in order of the images."""
    found: dict[tuple[str, str], list[int]] = {}
    assert images.domains is not None
    for domain, label, image in zip(images.domains, images.labels, images.images[:], strict=True):
        cell = images.domain_names[int(domain)], images.classes[int(label)]
        found.setdefault(cell, []).append(int(image[0, 0, 0]))
    return found


def test_without_lists_a_fifth_of_each_class_of_each_domain_is_for_the_test(folder):
    (folder / "notes.txt").write_text("no list")
    (folder / ".cache").mkdir()
    train, test = read_domains(folder, 3, seed=0)
    for images in (train, test):
        assert images.name == "many (3 domains)"
        assert images.classes == ("cat", "dog", "emu")
        assert images.domain_names == ("clipart", "real", "sketch")
        assert images.images.shape == (len(images), 3, 3, 3)
        assert images.domains is not None
        assert images.domains.tolist() == sorted(images.domains.tolist())
    kept, held_out = cells(train), cells(test)
    for domain, classes in COUNTS.items():
        for name, count in classes.items():
            own, tests = kept[domain, name], held_out.get((domain, name), [])
            assert len(tests) == min(max(1, round(count / 5)), count - 1)
            assert sorted(own + tests) == list(range(count))
            assert own == sorted(own)
    again, other = (
        cells(read_domains(folder, 3, seed=0)[1]),
        [cells(read_domains(folder, 3, seed=s)[1]) for s in (1, 2)],
    )
    assert again == held_out
    assert any(one != held_out for one in other)


def test_lists_say_what_is_for_the_test(folder):
    write_lists(folder)
    (folder / "real" / "cat" / "unlisted.png").write_text("not even an image")
    train, test = read_domains(folder, 4, seed=0)
    assert train.classes == test.classes == ("emu", "cat", "dog"), "in the order of the lists' labels"
    for images, is_test in ((train, False), (test, True)):
        assert cells(images) == {
            (domain, name): numbers
            for domain, classes in COUNTS.items()
            for name, count in classes.items()
            if (numbers := [i for i in range(count) if (i % 3 == 2) == is_test])
        }
    assert torch.equal(read_domains(folder, 4, seed=1)[0].images[:], train.images[:])


@pytest.mark.parametrize("lists", [False, True])
def test_the_largest_classes_are_those_with_most_training_images_in_all_domains(folder, lists):
    if lists:
        write_lists(folder)
        (folder / "real" / "emu" / "00.png").unlink()  # an image of no interest may be missing
    everything = read_domains(folder, 4, seed=0) if not lists else None
    train, test = read_domains(folder, 4, seed=0, classes=2)
    assert train.classes == test.classes == ("cat", "dog")
    assert train.name == "many (3 domains, 2 largest classes)"
    assert train.domain_names == ("clipart", "real", "sketch")
    if everything is not None:
        for some, every in zip((train, test), everything, strict=True):
            assert cells(some) == {cell: numbers for cell, numbers in cells(every).items() if cell[1] != "emu"}
    assert read_domains(folder, 4, seed=0, classes=1)[0].classes == ("cat",)
    for wrong in (0, 4, -1):
        with pytest.raises(ValueError, match=f"classes is {wrong}, expected 1 to 3"):
            read_domains(folder, 4, seed=0, classes=wrong)


@pytest.mark.parametrize(
    "line",
    [
        "clipart/../real/cat/00.png 3",
        "../clipart/cat/00.png 3",
        "clipart/../00.png 3",
        "clipart/cat/.. 3",
        "/clipart/cat/00.png 3",
        "real/cat/00.png 3",
        "clipart/cat/00.png",
        "clipart/cat/00.png three",
        "clipart/cat/00.png -1",
        "clipart/cat/00.png 99999999999",
        "clipart/cat\\..\\..\\00.png 3",
        "clipart/cat/0\0.png 3",
        "cat/00.png 3",
        "no such thing",
    ],
)
def test_lines_that_are_none_or_lead_elsewhere_are_refused(folder, line):
    write_lists(folder)
    (folder / "clipart_test.txt").write_text(f"clipart/cat/02.png 3\n{line}\n")
    with pytest.raises(ValueError, match=r"clipart_test.txt, line 2 is .*, expected clipart/<class>/<file> <label>"):
        read_domains(folder, 4, seed=0)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("real_test.txt", "", r"real_test.txt names no images: fetch it again"),
        ("real_test.txt", "\n \n", r"real_test.txt names no images"),
        ("real_test.txt", "real/cat/02.png 4", r"line 1 labels cat 4, but before cat is 3: fetch the lists again"),
        ("real_test.txt", "real/emu/02.png 3", r"line 1 labels emu 3, but before cat is 3"),
        ("real_test.txt", "real/fox/02.png 3", r"line 1 labels fox 3, but before cat is 3"),
        ("real_test.txt", "real/cat/02.png 3\nreal/cat/02.png 3", r"line 2 names cat/02.png again"),
        ("real_test.txt", "real/cat/00.png 3", r"real/cat/00.png is for training and for the test"),
        ("real_test.txt", b"\xff\xfe", r"real_test.txt is not text"),
        ("real_test.txt", "real/C:/02.png 3", r"line 1 is 'real/C:/02.png 3', expected real/<class>/<file> <label>"),
    ],
)
def test_corrupt_lists_are_named(folder, name, text, message):
    write_lists(folder)
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        read_domains(folder, 4, seed=0)


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder, expected one with a folder per domain"):
        read_domains(folder / "nowhere", 4, seed=0)
    with pytest.raises(NotADirectoryError, match=r"00.png is not a folder"):
        read_domains(folder / "real" / "cat" / "00.png", 4, seed=0)
    write_lists(folder)
    (folder / "real" / "cat" / "03.png").unlink()
    (folder / "real" / "dog" / "01.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 2 of the 50 images .* the first is real/cat/03.png: unpack"):
        read_domains(folder, 4, seed=0)
    (folder / "real_test.txt").write_text(f"real/cat/{'x' * 300}.png 3")  # longer than a name can be
    with pytest.raises(FileNotFoundError, match=r"lacks \d+ of the \d+ images"):
        read_domains(folder, 4, seed=0)
    (folder / "real_test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no real_test.txt, but such lists of other domains"):
        read_domains(folder, 4, seed=0)
    (folder / "quickdraw_train.txt").write_text("quickdraw/cat/0.png 3")
    with pytest.raises(
        FileNotFoundError, match=r"has lists for quickdraw but no such folders: unpack the images there"
    ):
        read_domains(folder, 4, seed=0)


def test_folders_that_are_not_of_domains_say_what_was_expected(folder, tmp_path):
    with pytest.raises(ValueError, match=r"cat holds no domains: expected .*/<domain>/<class>/<image>"):
        read_domains(folder / "real" / "cat", 4, seed=0)
    with pytest.raises(ValueError, match=r"cat holds no images: expected .*cat/<class>/<image>"):
        read_domains(folder / "real", 4, seed=0)
    (folder / "real" / "fox").mkdir()
    with pytest.raises(ValueError, match=r"real: the classes \['fox'\] have no images"):
        read_domains(folder, 4, seed=0)
    (folder / "real" / "fox").rmdir()
    (folder / "real" / "cat" / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match=r"bad.png cannot be read as an image"):
        read_domains(folder, 4, seed=0)
    with pytest.raises(ValueError, match=r"size is 0, expected at least 1 pixel"):
        read_domains(folder, 0, seed=0)
    (folder / "circle").symlink_to(folder / "circle")
    with pytest.raises(ValueError, match=r"circle: a link that leads nowhere"):
        read_domains(folder, 4, seed=0)


@pytest.fixture(scope="module")
def pacs() -> tuple[ImageSet, ImageSet]:
    root = os.environ.get("HILORA_TEST_DATA")
    if root is None or not Path(root, "pacs").is_dir():
        pytest.skip("HILORA_TEST_DATA does not name a folder that holds pacs")
    return read_domains(Path(root, "pacs"), 16, seed=0)


def test_the_real_pacs(pacs):
    train, test = pacs
    assert len(train) + len(test) == 9991
    assert train.classes == ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")
    assert train.domain_names == ("art_painting", "cartoon", "photo", "sketch")
    sizes = [torch.bincount(images.domains) for images in pacs]
    assert (sizes[0] + sizes[1]).tolist() == [2048, 2344, 1670, 3929]
    assert (sizes[1] / (sizes[0] + sizes[1])).tolist() == pytest.approx([0.2] * 4, abs=0.002)
    brightness = [train.images[train.domains == domain].float().mean() for domain in range(4)]
    assert max(brightness) == brightness[3], "sketches are black on white"
