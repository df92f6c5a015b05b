from __future__ import annotations

import os
import pickle
import struct
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hilora.errors import FileError
from hilora.federated.data.readers import download_cifar100, read_cifar100, read_image_folder, read_images

FINE = [f"fine_{i}" for i in range(100)]
COARSE = [f"coarse_{i}" for i in range(20)]


def cifar_arrays(n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    fine = rng.permutation(np.arange(n) % 100)
    return rng.integers(0, 256, (n, 3072), dtype=np.uint8), fine, fine * 7 % 20


SPLITS = {"train": cifar_arrays(200, 1), "test": cifar_arrays(100, 2)}


def write_binary(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name, (pixels, fine, coarse) in SPLITS.items():
        records = np.column_stack([coarse, fine, pixels]).astype(np.uint8)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    (folder / "fine_label_names.txt").write_text("\n".join(FINE) + "\n\n")
    (folder / "coarse_label_names.txt").write_text("\n".join(COARSE) + "\n")
    return folder


def python2_pickle(content: dict[str, object]) -> bytes:
    """What Python 2's cPickle with protocol 2 writes: `str` as bytes, and arrays under numpy's old names."""

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def string(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value if len(value) < 256 else b"T" + struct.pack("<i", len(value)) + value

    def write(value: object) -> bytes:
        if isinstance(value, np.ndarray):
            dtype = b"cnumpy\ndtype\n" + string(b"u1") + integer(0) + integer(1) + b"\x87R"
            dtype += b"(K\x03" + string(b"|") + b"NNN" + integer(-1) + integer(-1) + b"K\x00tb"
            shape = b"(" + b"".join(map(integer, value.shape)) + b"t"
            empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + string(b"b") + b"\x87R"
            return empty + b"(K\x01" + shape + dtype + b"\x89" + string(value.tobytes()) + b"tb"
        if isinstance(value, list):
            return b"](" + b"".join(map(write, value)) + b"e"
        return string(value.encode()) if isinstance(value, str) else integer(value)  # type: ignore[arg-type]

    return b"\x80\x02}(" + b"".join(string(k.encode()) + write(v) for k, v in content.items()) + b"u."


def batch(name: str) -> dict[str, object]:
    pixels, fine, coarse = SPLITS[name]
    return {
        "filenames": ["a.png"] * len(fine),
        "batch_label": "batch 1 of 1",
        "fine_labels": fine.tolist(),
        "coarse_labels": coarse.tolist(),
        "data": pixels,
    }


def write_python(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in SPLITS:
        (folder / name).write_bytes(python2_pickle(batch(name)))
    (folder / "meta").write_bytes(python2_pickle({"fine_label_names": FINE, "coarse_label_names": COARSE}))
    return folder


def assert_is_cifar(path: Path) -> None:
    for found, (pixels, fine, _) in zip(read_cifar100(path), SPLITS.values(), strict=True):
        assert np.array_equal(found.images[:].numpy(), pixels.reshape(-1, 3, 32, 32))
        assert found.images[:].is_contiguous()
        assert found.labels.tolist() == fine.tolist()
        assert found.classes == tuple(FINE)
        assert found.group_names == tuple(COARSE)
        assert found.groups is not None
        assert found.groups.tolist() == [i * 7 % 20 for i in range(100)]
        assert found.name == "cifar100"


def test_the_pickles_written_here_are_what_numpy_reads():
    content = pickle.loads(python2_pickle(batch("test")), encoding="bytes")
    assert np.array_equal(content[b"data"], SPLITS["test"][0])
    assert content[b"fine_labels"] == SPLITS["test"][1].tolist()


@pytest.mark.parametrize("write", [write_binary, write_python])
@pytest.mark.parametrize("inside", [False, True])
def test_both_layouts_are_found_and_read(tmp_path, write, inside):
    folder = write(tmp_path / f"cifar-100-{write.__name__.removeprefix('write_')}")
    assert_is_cifar(folder if inside else tmp_path)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pickles_of_python_3_are_read_too(tmp_path, protocol, order):
    folder = write_python(tmp_path / "cifar")
    for name in SPLITS:
        content: dict[object, object] = {key.encode(): value for key, value in batch(name).items()}
        content[b"data"] = np.asarray(SPLITS[name][0], order=order)
        content["fine_labels"] = np.asarray(content.pop(b"fine_labels"), dtype=">i8")
        (folder / name).write_bytes(pickle.dumps(content, protocol))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": FINE, b"coarse_label_names": COARSE}, protocol))
    assert_is_cifar(folder)


class Runs:
    """Pickles as a call."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("file", ["train", "test", "meta"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path, file, nested):
    folder, trace = write_python(tmp_path / "cifar"), tmp_path / "trace"
    for call in (
        Runs(os.system, f"touch {trace}"),
        Runs(open, str(trace), "w"),
        Runs(eval, f"open({str(trace)!r}, 'w')"),
    ):
        (folder / file).write_bytes(pickle.dumps({b"data": [call]} if nested else call, 2))
        with pytest.raises(ValueError, match=rf"{file} cannot be read .*refused; nothing was run") as refusal:
            read_cifar100(folder)
        assert isinstance(refusal.value.__cause__, pickle.UnpicklingError)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.array([{}, None], object), "array of dtype 'O8', expected numbers"),
        (np.zeros(3, "V8"), "array of dtype 'V8'"),
        (np.zeros(3, [("a", "u1")]), "array of dtype 'V1'"),
        (Runs(sys.modules["_codecs"].encode, "a", "rot13"), "bytes encoded as 'rot13'"),
        (Runs(np.array, [1]), "refused"),
        (np.float64(1), "refused"),
        (np.zeros((200, 3071), np.uint8), r"data are uint8 \(200, 3071\), expected uint8 \(n, 3072\)"),
        (np.zeros((200, 3072), np.int16), r"data are int16"),
        (np.zeros((199, 3072), np.uint8), r"fine_labels are int64 \(200,\), expected integers \(199,\)"),
        ([], r"data are float64 \(0,\)"),
        ([[1], [1, 2]], "lists in a list"),
    ],
)
def test_other_things_than_pixels_are_refused(tmp_path, value, message):
    folder = write_python(tmp_path / "cifar")
    (folder / "train").write_bytes(pickle.dumps(batch("train") | {"data": value}, 2))
    with pytest.raises(ValueError, match=message) as refusal:
        read_cifar100(folder)
    assert str(folder / "train") in str(refusal.value)


LAUGHS = b"".join(b"](" + b"h%c" % i * 9 + b"eq%c" % (i + 1) for i in range(20))  # lists, each nine times in the next


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02}r\xff\xff\xff\x3f.",  # LONG_BINPUT, of a billion
        b"\x80\x02}p99999999\n.",
        b"\x80\x04\x8e\xff\xff\xff\xff\x0f\x00\x00\x00.",  # BINBYTES8, of 64 GiB
        b"\x80\x02T\xff\xff\xff\x7f.",
        b"\x80\x05\x96\xff\xff\xff\xff\x0f\x00\x00\x00.",
        b"\x80\x02}U\x04data]q\x00(" + b"K\x01" * 9 + b"e" + LAUGHS + b"s.",
    ],
    ids=["memo", "text memo", "bytes", "string", "bytearray", "lists of lists"],
)
def test_a_small_file_takes_no_memory(tmp_path, content):
    folder = write_python(tmp_path / "cifar")
    (folder / "train").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileError, match=r"train cannot be read as CIFAR-100.*fetch it again"):
            read_cifar100(folder)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


def test_an_array_whose_dtype_lies_is_refused(tmp_path):
    """A dtype's state may carry fields; numpy itself would take the offsets and pointers in it on trust."""
    folder = write_python(tmp_path / "cifar")
    honest = (folder / "train").read_bytes()
    for code in (b"O8", b"V8", b"M8"):
        (folder / "train").write_bytes(honest.replace(b"cnumpy\ndtype\nU\x02u1", b"cnumpy\ndtype\nU\x02" + code))
        with pytest.raises(ValueError, match=f"array of dtype {code.decode()!r}"):
            read_cifar100(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fine_labels": [100] * 200}, "fine labels range over 100 to 100, expected 0 to 99"),
        ({"fine_labels": [-1] * 200}, "fine labels range over -1 to -1"),
        ({"coarse_labels": [20] * 200}, "coarse labels range over 20 to 20, expected 0 to 19"),
        ({"coarse_labels": ["a"] * 200}, r"coarse_labels are <U1|coarse_labels are \|S1"),
        ({"coarse_labels": list(range(20)) * 10}, "lies in two superclasses"),
    ],
)
def test_labels_that_cannot_be_are_refused(tmp_path, change, message):
    folder = write_python(tmp_path / "cifar")
    (folder / "train").write_bytes(python2_pickle(batch("train") | change))
    with pytest.raises(ValueError, match=message) as refusal:
        read_cifar100(folder)
    assert str(folder / "train") in str(refusal.value)


def test_damaged_files_are_named(tmp_path):
    python, binary = write_python(tmp_path / "python"), write_binary(tmp_path / "binary")
    for file in (python / "train", python / "meta", binary / "test.bin", binary / "train.bin"):
        whole = file.read_bytes()
        for damaged in (whole[:-100], b"", b"no such thing", pickle.dumps([1]), pickle.dumps({"data": 1})):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"{file.name} .*fetch it again"):
                read_cifar100(file.parent)
        file.write_bytes(whole)
    (binary / "fine_label_names.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"fine_label_names.txt is not text"):
        read_cifar100(binary)
    (binary / "fine_label_names.txt").write_text("apple\nbear\n")
    with pytest.raises(ValueError, match=r"train.bin: fine labels range over 0 to 99, expected 0 to 1"):
        read_cifar100(binary)
    (python / "meta").write_bytes(python2_pickle({"fine_label_names": [1], "coarse_label_names": COARSE}))
    with pytest.raises(ValueError, match=r"meta: .* not both lists of names"):
        read_cifar100(python)
    names = [b"\xff%d" % i for i in range(100)]
    (python / "meta").write_bytes(pickle.dumps({b"fine_label_names": names, b"coarse_label_names": COARSE}, 2))
    with pytest.raises(FileError, match=r"meta: a name of a class is not text .*: fetch it again"):
        read_cifar100(python)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked there, in cifar-100-binary .*download_cifar100"):
        read_cifar100(tmp_path)
    binary = write_binary(tmp_path / "cifar-100-binary")
    (binary / "test.bin").unlink()
    (binary / "coarse_label_names.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no test.bin, coarse_label_names.txt"):
        read_images(tmp_path, 32, 0)


def test_a_class_without_images_has_no_known_superclass(tmp_path):
    binary = write_binary(tmp_path / "cifar")
    for name, (pixels, fine, coarse) in SPLITS.items():
        records = np.column_stack([coarse, fine, pixels]).astype(np.uint8)[fine != 3]
        (binary / f"{name}.bin").write_bytes(records.tobytes())
    groups = read_cifar100(binary)[0].groups
    assert groups is not None
    assert groups[3] == -1
    assert (groups >= 0).sum() == 99


def test_a_download_is_unpacked_in_place(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    calls = []

    def fetch(root: str, download: bool) -> None:
        calls.append(download)
        write_python(Path(root) / "cifar-100-python")

    monkeypatch.setattr(datasets, "CIFAR100", fetch)
    download_cifar100(tmp_path / "new")
    assert_is_cifar(tmp_path / "new")
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["cifar-100-python"]
    download_cifar100(tmp_path / "new")
    assert calls == [True]


def test_a_download_that_fails_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    def fail(root: str, download: bool) -> None:
        (Path(root) / "cifar-100-python.tar.gz").write_bytes(b"half")
        raise OSError("no route to host")

    monkeypatch.setattr(datasets, "CIFAR100", fail)
    with pytest.raises(RuntimeError, match=r"could not be fetched .*no route to host.*check the network"):
        download_cifar100(tmp_path)
    assert list(tmp_path.iterdir()) == []


def save(
    path: Path, colour: tuple[int, int, int] = (10, 20, 30), size: tuple[int, int] = (12, 8), mode: str = "RGB"
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).convert(mode).save(path)


def test_a_folder_with_its_own_split_is_read_in_order(tmp_path):
    root = tmp_path / "pets"
    for part, shade in (("train", 100), ("val", 200)):
        for label, name in enumerate(("cat", "dog")):
            for i, suffix in enumerate(("png", "PNG", "bmp", "webp", "jpg", "JPEG")):
                save(root / part / name / f"{i}.{suffix}", (shade, 40 * label, 10 * i))
    (root / "train" / "cat" / "notes.txt").write_text("no image")
    (root / "train" / "cat" / ".hidden.png").write_text("no image")
    (root / "train" / ".cache").mkdir()
    for images, shade in zip(read_images(root, 8, seed=0), (100, 200), strict=True):
        assert images.name == "pets (image folder)"
        assert images.classes == ("cat", "dog")
        assert images.groups is None
        assert images.images.shape == (12, 3, 8, 8)
        assert images.images[:].is_contiguous()
        assert images.labels.tolist() == [0] * 6 + [1] * 6
        colours = torch.tensor([[shade, 40 * label, 10 * i] for label in range(2) for i in range(6)])
        assert ((images.images[:][..., 4, 4].int() - colours).abs() <= 6).all()


def test_a_folder_without_a_split_is_split_by_class_and_seed(tmp_path):
    for name, n in (("a", 10), ("b", 5), ("c", 1), ("d", 2)):
        for i in range(n):
            save(tmp_path / name / f"{i:02}.png", (i, 0, 0))
    train, test = read_image_folder(tmp_path, 4, seed=0)
    assert torch.bincount(train.labels).tolist() == [8, 4, 1, 1]
    assert torch.bincount(test.labels, minlength=4).tolist() == [2, 1, 0, 1]
    for label, n in enumerate((10, 5, 1, 2)):
        shades = [part.images[part.labels == label][:, 0, 0, 0].tolist() for part in (train, test)]
        assert sorted(shades[0] + shades[1]) == list(range(n))
        assert all(part == sorted(part) for part in shades)
    again, other = (
        read_image_folder(tmp_path, 4, seed=0)[1],
        [read_image_folder(tmp_path, 4, seed=s)[1] for s in (1, 2, 3)],
    )
    assert torch.equal(again.images[:], test.images[:])
    assert any(not torch.equal(one.images[:], test.images[:]) for one in other)


def test_images_are_resized_by_the_shorter_side_and_cropped_about_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, :20], pixels[:, 20:40], pixels[:, 40:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for i in range(2):
        save(tmp_path / "a" / f"{i}.png")
        Image.fromarray(pixels).save(tmp_path / "a" / f"{i}.png")
    image = read_image_folder(tmp_path, 10, seed=0)[0].images[0]
    assert (image[:, :, 1:-1] == torch.tensor([0, 255, 0]).view(3, 1, 1)).all()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_any_mode_becomes_rgb(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    save(tmp_path / "a" / f"0.{suffix}", (255, 255, 255), mode=mode)
    assert (read_image_folder(tmp_path, 4, seed=0)[0].images[:] >= 250).all()


def test_a_class_may_be_called_train(tmp_path):
    for name in ("train", "tram"):
        for i in range(5):
            save(tmp_path / name / f"{i}.png")
    assert read_images(tmp_path, 4, seed=0)[0].classes == ("train", "tram")


def test_folders_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        read_images(tmp_path / "nowhere", 4, 0)
    with pytest.raises(ValueError, match="holds no images: expected"):
        read_images(tmp_path, 4, 0)
    save(tmp_path / "set" / "a" / "0.png")
    with pytest.raises(NotADirectoryError, match=r"0.png is not a folder"):
        read_images(tmp_path / "set" / "a" / "0.png", 4, 0)
    with pytest.raises(ValueError, match="size is 0"):
        read_images(tmp_path / "set", 0, 0)
    (tmp_path / "set" / "empty").mkdir()
    with pytest.raises(ValueError, match=r"the classes \['empty'\] have no images"):
        read_images(tmp_path / "set", 4, 0)
    save(tmp_path / "two" / "train" / "a" / "0.png")
    save(tmp_path / "two" / "test" / "b" / "0.png")
    with pytest.raises(ValueError, match=r"different classes, only one of them has \['a', 'b'\]"):
        read_images(tmp_path / "two", 4, 0)


def test_files_that_are_no_images_are_named(tmp_path):
    good, bad = tmp_path / "a" / "0.png", tmp_path / "a" / "1.png"
    save(good)
    Image.effect_noise((64, 64), 50).save(tmp_path / "a" / "2.png")
    for content in (b"", b"no image", (tmp_path / "a" / "2.png").read_bytes()[:1000]):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
            read_images(tmp_path, 4, 0)
    bad.unlink()
    bad.symlink_to(bad)
    with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
        read_images(tmp_path, 4, 0)
    bad.unlink()
    bad.mkdir()
    with pytest.raises(ValueError, match=r"1.png cannot be read as an image"):
        read_images(tmp_path, 4, 0)


def test_links_in_a_circle_are_named(tmp_path):
    save(tmp_path / "a" / "0.png")
    circle = tmp_path / "b"
    circle.symlink_to(circle)
    with pytest.raises(ValueError, match=r"/b: a link that leads nowhere, or back to itself"):
        read_images(tmp_path, 4, 0)
    circle.unlink()
    circle.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"the classes \['b'\] have no images"):
        read_images(tmp_path, 4, 0)


def test_a_linked_folder_keeps_the_name_of_its_link(tmp_path, monkeypatch):
    for i in range(2):
        save(tmp_path / "x1" / "a" / f"{i}.png")
    (tmp_path / "pets").symlink_to(tmp_path / "x1")
    assert read_images(tmp_path / "pets", 4, 0)[0].name == "pets (image folder)"
    monkeypatch.chdir(tmp_path / "x1")
    assert read_images(".", 4, 0)[0].name == "x1 (image folder)"


@pytest.fixture(scope="module")
def real_folder() -> Path:
    if "HILORA_TEST_DATA" not in os.environ:
        pytest.skip("HILORA_TEST_DATA does not name a folder that holds cifar-100-binary")
    return Path(os.environ["HILORA_TEST_DATA"])


def test_the_real_cifar100(real_folder):
    train, test = read_images(real_folder, 32, 0)
    assert (len(train), len(test)) == (50_000, 10_000)
    assert train.groups is not None
    assert torch.bincount(train.groups).tolist() == [5] * 20
    assert torch.bincount(train.labels).tolist() == [500] * 100
    assert torch.bincount(test.labels).tolist() == [100] * 100
    trees = [train.classes[i] for i in (train.groups == train.group_names.index("trees")).nonzero().flatten()]
    assert trees == ["maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"]
