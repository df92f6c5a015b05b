"""Images of the same classes in several domains, such as photos and sketches: PACS, DomainNet and their like."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hilora.federated.data.folders import SUFFIXES, list_classes, list_folder, load_images, open_folder, split
from hilora.federated.data.images import ImageSet

_LIST = re.compile(r"(.+)_(train|test)\.txt")
_LINE = re.compile(r"([^/\\:\0]+)/([^/\\:\0]+)/([^/\\:\0]+) +([0-9]{1,9})")  # nothing that leads elsewhere, as C:

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
        FileNotFoundError, NotADirectoryError: `path` is not a folder; or a list, a domain or an image is missing.
        ValueError: there are no domains, a domain or a class holds no images, a list is corrupt or leads out of its
            domain, an image cannot be read, or `size` or `classes` is out of range.
    """
    root = open_folder(path, "one with a folder per domain, and a folder per class inside it")
    entries = list_folder(root)
    domains = [entry.name for entry in entries if entry.is_dir()]
    if not domains:
        raise ValueError(f"{root} holds no domains: expected {root}/<domain>/<class>/<image>, {' '.join(SUFFIXES)}")
    listed = sorted({match[1] for entry in entries if entry.is_file() and (match := _LIST.fullmatch(entry.name))})
    parts, names = _read_lists(root, domains, listed) if listed else _split_domains(root, domains, seed)
    what = f"{len(domains)} domains"
    if classes is not None:
        names, what = _largest(parts[0], names, classes), f"{what}, {classes} largest classes"
    chosen = [{cell: files for cell, files in part.items() if cell[1] in names} for part in parts]
    _check_files(root, [file for part in chosen for files in part.values() for file in files])
    train, test = (_load(part, size, domains, names, f"{root.name} ({what})") for part in chosen)
    return train, test


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
        raise FileNotFoundError(f"{root} has lists for {', '.join(lost)} but no such folders: unpack the images there")
    names = [f"{domain}_{part}.txt" for domain in domains for part in ("train", "test")]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{root} has no {', '.join(missing)}, but such lists of other domains: fetch them too, or remove the "
            "folders that they are about"
        )
    labels: dict[str, int] = {}
    train, test = (
        {cell: files for domain in domains for cell, files in _read_list(root, domain, part, labels).items()}
        for part in ("train", "test")
    )
    if both := next((file for cell in train.keys() & test.keys() for file in set(train[cell]) & set(test[cell])), None):
        raise ValueError(f"{both} is for training and for the test, by the lists beside it: fetch these again")
    return (train, test), sorted(labels, key=labels.__getitem__)


def _read_list(root: Path, domain: str, part: str, labels: dict[str, int]) -> Cells:
    """The images in one list, by class and file name. Enters the labels of its classes, which must be those there."""
    path = root / f"{domain}_{part}.txt"
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text ({error}): fetch it again") from error
    files: dict[str, set[str]] = {}
    names = {label: name for name, label in labels.items()}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None or match[1] != domain or not {match[2], match[3]}.isdisjoint((".", "..")):
            said, expected = repr(line[:100]), f"{domain}/<class>/<file> <label>"
            raise ValueError(f"{path}, line {number} is {said}, expected {expected}: fetch it again")
        name, file, label = match[2], match[3], int(match[4])
        if labels.setdefault(name, label) != label or names.setdefault(label, name) != name:
            known = f"{names[label]} is {label}" if label in names else f"{name} is {labels[name]}"
            raise ValueError(f"{path}, line {number} labels {name} {label}, but before {known}: fetch the lists again")
        if file in files.setdefault(name, set()):
            raise ValueError(f"{path}, line {number} names {name}/{file} again: fetch it again")
        files[name].add(file)
    if not files:
        raise ValueError(f"{path} names no images: fetch it again")
    return {(domain, name): [root / domain / name / file for file in sorted(files[name])] for name in sorted(files)}


def _largest(train: Cells, names: Sequence[str], count: int) -> list[str]:
    """So many of the classes, those with most training images, in the order in which they came."""
    if not 1 <= count <= len(names):
        raise ValueError(f"classes is {count}, expected 1 to {len(names)}, as many as there are")
    sizes: Counter[str] = Counter()
    for (_, name), files in train.items():
        sizes[name] += len(files)
    kept = sorted(names, key=lambda name: -sizes[name])[:count]
    return [name for name in names if name in kept]


def _check_files(root: Path, files: Sequence[Path]) -> None:
    if missing := [str(file.relative_to(root)) for file in files if not file.is_file()]:
        raise FileNotFoundError(
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
