"""Images of the same classes in several domains, such as photos and sketches: PACS, DomainNet and their like."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch

from hilora.errors import FileError, InvalidValueError, MissingFileError
from hilora.federated.data.files import (
    check_names,
    is_image,
    is_leftover,
    list_classes,
    list_folder,
    open_folder,
    split,
)
from hilora.federated.data.images import ImageSet
from hilora.federated.data.pixels import SUFFIXES, load_images
from hilora.federated.data.readers.base import Reader

_LIST = re.compile(r"(.+)_(train|test)\.txt")
_LINE = re.compile(r"([^/\\:\0]+)/([^/\\:\0]+)/([^/\\:\0]+) +([0-9]{1,9})")  # nothing that leads elsewhere, as C:
_PARTS = frozenset(("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval"))  # no domains

Cells = dict[tuple[str, str], list[Path]]
"""The images of each domain and class."""


def read_domains(path: str | Path, size: int, seed: int, classes: int | None = None) -> tuple[ImageSet, ImageSet]:
    """Reads a folder that has a folder per domain, with a folder per class inside it.

    Where lists `<domain>_train.txt` and `<domain>_test.txt` lie beside the domains, as DomainNet has them, they say
    which images there are, in lines `domain/class/file label`, and which are for the test. Elsewhere (PACS) a fifth of
    each class in each domain, drawn by `seed`, is for the test. A domain may lack classes, as DomainNet's paintings do.

    Args:
        path: the folder; its name is in the name of the data.
        size: height and width of the result: the shorter side is resized to it, the longer cropped about the centre.
        seed: of the split where there are no lists.
        classes: takes so many classes, those with most training images in all domains together; None takes all.

    Returns:
        The training and the test images, uint8 `[n, 3, size, size]`, with their domains; sorted by domain, class and
        file name. Classes are in the order of the lists' labels, or by name.

    Raises:
        MissingFileError, NotAFolderError: `path` is not a folder; or a list, a domain or an image is missing.
        FileError: there are no domains, a domain or a class holds no images, two classes have the same name to some
            systems, a list is corrupt or leads out of its domain, or an image cannot be read.
        InvalidValueError: `size` or `classes` is out of range.
    """
    root = open_folder(path, "one with a folder per domain, and a folder per class inside it")
    entries = list_folder(root)
    domains = [entry.name for entry in entries if entry.is_dir()]
    if not domains:
        raise FileError(f"{root} holds no domains: expected {root}/<domain>/<class>/<image>, {' '.join(SUFFIXES)}")
    listed = sorted({match[1] for entry in entries if entry.is_file() and (match := _LIST.fullmatch(entry.name))})
    parts, names = _read_lists(root, domains, listed) if listed else _split_domains(root, domains, seed)
    check_names(names, str(root))
    what = f"{len(domains)} domains"
    if classes is not None:
        names, what = _largest(parts[0], names, classes), f"{what}, {classes} largest classes"
    chosen = [{cell: files for cell, files in part.items() if cell[1] in names} for part in parts]
    _check_files(root, [file for part in chosen for files in part.values() for file in files])
    train, test = (_load(part, size, domains, names, f"{root.name} ({what})") for part in chosen)
    return train, test


class Domains(Reader):
    """Folders of the same classes side by side, or lists of DomainNet's kind beside its folders."""

    name: ClassVar[str] = "domains"

    def recognises(self, path: Path) -> bool:
        if not path.is_dir():
            return False
        entries = list(path.iterdir())
        if any(entry.is_file() and _LIST.fullmatch(entry.name) for entry in entries):
            return True
        folders = [entry for entry in entries if entry.is_dir() and not is_leftover(entry)]
        if len(folders) < 2 or any(folder.name.lower() in _PARTS for folder in folders):
            return False
        inside = [_classes_at_a_glance(folder) for folder in folders]
        shared = Counter(name for names in inside for name in names)
        return all(inside) and sum(count > 1 for count in shared.values()) > 1

    def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
        return read_domains(path, size, seed)


def _classes_at_a_glance(folder: Path) -> list[str]:
    """The folders in it that hold images; none where it holds images itself."""
    entries = [entry for entry in folder.iterdir() if not is_leftover(entry)]
    if any(is_image(entry.name) for entry in entries):
        return []
    return [entry.name for entry in entries if entry.is_dir() and any(is_image(file.name) for file in entry.iterdir())]


def _split_domains(root: Path, domains: Sequence[str], seed: int) -> tuple[tuple[Cells, Cells], list[str]]:
    """Draws the training and the test images; returns these and the names of the classes."""
    rng = np.random.default_rng(seed)
    train: Cells = {}
    test: Cells = {}
    for domain in domains:
        for name, files in list_classes(root / domain).items():
            train[domain, name], test[domain, name] = split(files, rng)
    return (train, test), sorted({name for _, name in train})


def _read_lists(root: Path, domains: Sequence[str], listed: Sequence[str]) -> tuple[tuple[Cells, Cells], list[str]]:
    """The same as the lists have it, among them those of the domains `listed`."""
    if lost := sorted(set(listed) - set(domains)):
        raise MissingFileError(f"{root} has lists for {', '.join(lost)} but no such folders: unpack the images there")
    names = [f"{domain}_{part}.txt" for domain in domains for part in ("train", "test")]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise MissingFileError(
            f"{root} has no {', '.join(missing)}, but such lists of other domains: fetch them too, or remove the "
            "folders that they are about"
        )
    labels: dict[str, int] = {}
    train, test = (
        {cell: files for domain in domains for cell, files in _read_list(root, domain, part, labels).items()}
        for part in ("train", "test")
    )
    if both := next((file for cell in train.keys() & test.keys() for file in set(train[cell]) & set(test[cell])), None):
        raise FileError(f"{both} is for training and for the test, by the lists beside it: fetch these again")
    return (train, test), sorted(labels, key=labels.__getitem__)


def _read_list(root: Path, domain: str, part: str, labels: dict[str, int]) -> Cells:
    """The images in one list, by class and file name. Enters the labels of its classes, which must be those there."""
    path = root / f"{domain}_{part}.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not text ({error}): fetch it again") from error
    files: dict[str, set[str]] = {}
    names = {label: name for name, label in labels.items()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1] != domain or not {match[2], match[3]}.isdisjoint((".", "..")):
            said, expected = repr(line[:100]), f"{domain}/<class>/<file> <label>"
            raise FileError(f"{path}, line {number} is {said}, expected {expected}: fetch it again")
        name, file, label = match[2], match[3], int(match[4])
        if labels.setdefault(name, label) != label or names.setdefault(label, name) != name:
            known = f"{names[label]} is {label}" if label in names else f"{name} is {labels[name]}"
            raise FileError(f"{path}, line {number} labels {name} {label}, but before {known}: fetch the lists again")
        if file in files.setdefault(name, set()):
            raise FileError(f"{path}, line {number} names {name}/{file} again: fetch it again")
        files[name].add(file)
    if not files:
        raise FileError(f"{path} names no images: fetch it again")
    return {(domain, name): [root / domain / name / file for file in sorted(files[name])] for name in sorted(files)}


def _largest(train: Cells, names: Sequence[str], count: int) -> list[str]:
    """So many of the classes, those with most training images, in the order in which they came."""
    if not 1 <= count <= len(names):
        raise InvalidValueError(f"classes is {count}, expected 1 to {len(names)}, as many as there are")
    sizes: Counter[str] = Counter()
    for (_, name), files in train.items():
        sizes[name] += len(files)
    kept = sorted(names, key=lambda name: -sizes[name])[:count]
    return [name for name in names if name in kept]


def _check_files(root: Path, files: Sequence[Path]) -> None:
    if missing := [str(file.relative_to(root)) for file in files if not os.path.isfile(file)]:
        raise MissingFileError(
            f"{root} lacks {len(missing)} of the {len(files)} images that its lists name, the first is {missing[0]}: "
            "unpack the images again"
        )


def _load(part: Cells, size: int, domains: Sequence[str], names: Sequence[str], what: str) -> ImageSet:
    sizes = torch.tensor([len(files) for files in part.values()], dtype=torch.int64)
    return ImageSet(
        images=load_images([file for files in part.values() for file in files], size),
        labels=torch.tensor([names.index(name) for _, name in part], dtype=torch.int64).repeat_interleave(sizes),
        classes=tuple(names),
        name=what,
        domains=torch.tensor([domains.index(domain) for domain, _ in part], dtype=torch.int64).repeat_interleave(sizes),
        domain_names=tuple(domains),
    )
