"""Folders of images as people have them: what in them is an image, what belongs to the system, what is passed over."""

from __future__ import annotations

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from hilora.errors import FileError, MissingFileError, NotAFolderError
from hilora.federated.data.pixels import SUFFIXES

# What systems leave in folders, beside what begins with a dot; none of it is a class or an image.
_LEFTOVERS = frozenset(
    ("__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found", "thumbs.db")
)
# Pictures that are not read; where they are, that is said.
_OTHER_PICTURES = frozenset(
    (".apng", ".avif", ".cr2", ".dng", ".heic", ".heif", ".ico", ".j2k", ".jp2", ".jxl", ".nef", ".pbm", ".pcx")
    + (".pgm", ".pnm", ".ppm", ".psd", ".svg", ".tga")
).difference(SUFFIXES)
_BELOW = "in folders below a class"


def open_folder(path: str | Path, expected: str) -> Path:
    """The absolute path of a folder, links in its name kept.

    Raises:
        MissingFileError, NotAFolderError: it is none; says what was `expected`.
    """
    root = Path(os.path.abspath(path))
    if not root.is_dir():
        error = NotAFolderError if root.exists() else MissingFileError
        raise error(f"{path} is not a folder, expected {expected}")
    return root


def list_folder(folder: Path) -> list[Path]:
    """What a folder holds, by name, without what begins with a dot or what systems leave (`__MACOSX`, `@eaDir`, …).

    Raises:
        FileError: a link in it leads nowhere.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if not is_leftover(entry)]
    if broken := [str(entry) for entry in entries if not entry.exists()]:
        raise FileError(f"{', '.join(broken)}: a link that leads nowhere, or back to itself; remove it")
    return entries


def list_classes(folder: Path) -> dict[str, list[Path]]:
    """The images of each class of a folder, both by name. Warns of pictures that are passed over.

    Raises:
        FileError: there are no images, a class has none, or two classes have the same name to some systems.
    """
    classes = {entry.name: list_images(entry) for entry in list_folder(folder) if entry.is_dir()}
    others = {name: _others(folder / name) for name in classes}
    below = [name for name, files in classes.items() if not files and others[name][_BELOW]]
    hint = f"; pictures lie in folders below {', '.join(below)}, move them up" if below else ""
    if not any(classes.values()):
        expected = f"expected {folder}/<class>/<image>, {' '.join(SUFFIXES)}"
        raise FileError(f"{folder} holds no images: {expected}{hint}")
    if empty := [name for name, files in classes.items() if not files]:
        said = f"the classes {empty} have no images ({' '.join(SUFFIXES)})"
        raise FileError(f"{folder}: {said}: remove or fill them{hint}")
    check_names(classes, str(folder))
    if kinds := sum(others.values(), Counter[str]()):
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        remedy = f"only files {' '.join(SUFFIXES)} in the folder of a class itself are read: convert or move them"
        warnings.warn(f"{folder}: {kinds.total()} pictures are passed over ({said}); {remedy}", stacklevel=3)
    return classes


def list_images(folder: Path) -> list[Path]:
    """What has the name of an image and lies in a folder itself, by name."""
    return [file for file in sorted(folder.iterdir()) if is_image(file.name)]


def is_leftover(path: Path) -> bool:
    """Whether it is hidden, or something that systems leave in folders."""
    return path.name.startswith(".") or path.name.lower() in _LEFTOVERS


def is_image(name: str) -> bool:
    """Whether a file is called like an image, and not hidden."""
    return name.lower().endswith(SUFFIXES) and name[0] != "."


def check_names(names: Iterable[str], where: str) -> None:
    """Sees that no two classes have the same name to some systems: in Unicode's normal form, in any case of letters.

    Raises:
        FileError: naming two that have.
    """
    known: dict[str, str] = {}
    for name in names:
        form = unicodedata.normalize("NFC", name)
        twin = known.setdefault(form.casefold(), name)
        if twin != name:
            how = "in form" if unicodedata.normalize("NFC", twin) == form else "in case"
            which = f"the classes {twin!a} and {name!a} differ {how} only"
            raise FileError(f"{where}: {which}, and are one to some systems: merge them, or rename one")


def split(files: Sequence[Path], rng: np.random.Generator) -> tuple[list[Path], list[Path]]:
    """Draws a fifth of the files for the test, one at least, while one is left for the training: training, test."""
    tests = rng.permutation(len(files)) < min(max(1, round(len(files) / 5)), len(files) - 1)
    train = [file for file, is_test in zip(files, tests, strict=True) if not is_test]
    test = [file for file, is_test in zip(files, tests, strict=True) if is_test]
    return train, test


def _others(folder: Path) -> Counter[str]:
    """The pictures in the folder of a class that are not read, by suffix, or by lying deeper; follows no links."""
    found: Counter[str] = Counter()
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_leftover(Path(name))]
        if Path(place) == folder:
            suffixes = (Path(name).suffix.lower() for name in names if not is_leftover(Path(name)))
            found.update(suffix for suffix in suffixes if suffix in _OTHER_PICTURES)
        else:
            found[_BELOW] += sum(map(is_image, names))
    return +found
