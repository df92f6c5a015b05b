"""What reads files that somebody may be handed: for each kind a whole file, and the reader that it is given to."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

import hilora
from hilora.adapters.injection import banks
from hilora.cli.contents import contents
from hilora.experiments.ledger import Ledger
from hilora.experiments.spec import read_experiment
from hilora.federated.archive import packed
from hilora.federated.callbacks.checkpoint import CHECKPOINT, load_checkpoint
from hilora.federated.data.readers import read_cifar100, read_domains, read_image_folder
from hilora.models.backbone import load_backbone
from hilora.models.glyph_vit import WEIGHTS
from hilora.reporting.summary import read_summary
from tests.helpers import injected, vit

ROOT = Path(hilora.__file__).resolve().parents[1]
MARK = "code-of-a-file-has-run"
"""The folder that a call in a file would make, in the current one."""


@dataclass(frozen=True)
class Target:
    """A kind of file.

    Attributes:
        make: writes whole files into an empty folder; gives that which is to be damaged.
        read: reads it, or what is around it, into something that can be compared by `==`.
        checked: whether a damage that changes what is read is always noticed: there is a checksum.
        refused: whether the whole file is refused already.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    checked: bool = False
    refused: bool = False


def _adapters(folder: Path) -> Path:
    hilora.save_adapters(injected(), folder / "a.safetensors")
    return folder / "a.safetensors"


def _factors(model: Any) -> list[Any]:
    return [factor(tier).tolist() for bank in banks(model) for tier in bank.tiers for factor in (bank.A, bank.B)]


def _load(path: Path) -> Any:
    return _factors(hilora.load_adapters(vit(), path))


def _load_into(path: Path) -> Any:
    return _factors(hilora.load_adapters(injected(), path))


def _peft(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        hilora.export_peft(injected(), folder)
        return folder / name

    return make


def _import(path: Path) -> Any:
    return len(_factors(hilora.import_peft(hilora.inject(vit(), hilora.HiLoRAConfig(r=8)), path.parent, tier="leaf")))


def _checkpoint(folder: Path) -> Path:
    tree = {"identity": {"dtype": "float32"}, "strategy": {"head": torch.arange(6.0)}, "round": 3}
    (folder / CHECKPOINT).write_bytes(packed(tree))
    return folder / CHECKPOINT


def _resume(path: Path) -> Any:
    state = load_checkpoint(path.parent)
    return {**state, "strategy": state["strategy"]["head"].tolist()}


def _experiment(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        source = next(ROOT.glob(f"benchmarks/experiments/**/more_images{suffix}"))
        lines = source.read_bytes().splitlines(keepends=True)
        (folder / f"x{suffix}").write_bytes(b"".join(lines[:3] if suffix.endswith(".jsonl") else lines))
        return folder / f"x{suffix}"

    return make


def _summary(folder: Path) -> Path:
    accuracy = '{"mean": 0.5, "tail": 0.25, "std": 0.1}'
    (folder / "summary.json").write_text(
        f'{{"schema": 2, "strategy": "fedit", "partition": "patho", "seed": 0, "data": "x", "backbone": "y", '
        f'"tiers": {{"root": {accuracy}}}, "final": {accuracy}, "unseen": {{"zero_leaf": null, "leaf": 0.5}}, '
        '"clusters": {"k": 1, "labels": [0, 0], "ari": null}, "seconds": 1.5, "images_per_second": 20.0}'
    )
    return folder / "summary.json"


CLASSES = [f"c{number}" for number in range(10)]


def _cifar_binary(folder: Path) -> Path:
    draws = np.random.default_rng(0)
    for name in ("train.bin", "test.bin"):
        labels = np.arange(20) % 10
        pixels = draws.integers(0, 256, (20, 3072))
        np.concatenate([labels[:, None] // 5, labels[:, None], pixels], 1).astype(np.uint8).tofile(folder / name)
    (folder / "fine_label_names.txt").write_text("\n".join(CLASSES))
    (folder / "coarse_label_names.txt").write_text("a\nb\n")
    return folder / "train.bin"


def _cifar_python(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        draws = np.random.default_rng(0)
        fine = [number % 10 for number in range(20)]
        for part in ("train", "test"):
            batch = {b"data": draws.integers(0, 256, (20, 3072), dtype=np.uint8), b"fine_labels": fine}
            batch[b"coarse_labels"] = [label // 5 for label in fine]
            (folder / part).write_bytes(pickle.dumps(batch, 2))
        names = {b"fine_label_names": [one.encode() for one in CLASSES], b"coarse_label_names": [b"a", b"b"]}
        (folder / "meta").write_bytes(pickle.dumps(names, 2))
        return folder / name

    return make


def _cifar(path: Path) -> Any:
    train, _ = read_cifar100(path.parent)
    return train.labels.tolist()


def _picture(format: str, suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        draws = np.random.default_rng(0)
        for number in range(2):
            (folder / f"class{number}").mkdir()
            for place in range(3):
                image = Image.fromarray(draws.integers(0, 256, (12, 12, 3), dtype=np.uint8))
                image.save(folder / f"class{number}" / f"{place}{suffix}", format)
        return folder / "class0" / f"0{suffix}"

    return make


def _folder(path: Path) -> Any:
    images = read_image_folder(path.parents[1], 8, 0)[0].images
    assert isinstance(images, torch.Tensor)  # they fit memory
    return images.sum((1, 2, 3)).tolist()


def _domain_list(folder: Path) -> Path:
    for domain in ("one", "two"):
        lines = []
        for name in ("a", "b"):
            (folder / domain / name).mkdir(parents=True)
            for place in range(3):
                Image.new("RGB", (8, 8), (place, 0, 0)).save(folder / domain / name / f"{place}.png")
                lines.append(f"{domain}/{name}/{place}.png {'ab'.index(name)}\n")
        (folder / f"{domain}_train.txt").write_text("".join(lines[::3] + lines[1::3]))
        (folder / f"{domain}_test.txt").write_text("".join(lines[2::3]))
    return folder / "one_train.txt"


def _domains(path: Path) -> Any:
    return read_domains(path.parent, 8, 0)[0].labels.tolist()


class Call:
    """Pickled, it is a call that leaves a mark where it is run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def _call_in_cifar(folder: Path) -> Path:
    path = _cifar_python("train")(folder)
    path.write_bytes(pickle.dumps({b"data": Call(), b"fine_labels": [0], b"coarse_labels": [0]}, 2))
    return path


def _call_in_weights(folder: Path) -> Path:
    torch.save({"head.weight": Call()}, folder / "weights.pth")
    return folder / "weights.pth"


@cache
def _vit_weights() -> dict[str, torch.Tensor]:
    import timm

    torch.manual_seed(0)
    return dict(timm.create_model("test_vit").state_dict())


def _weights(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"weights{suffix}"
        (save_file if suffix == ".safetensors" else torch.save)(_vit_weights(), path)
        return path

    return make


def _backbone(path: Path) -> Any:
    return load_backbone("test_vit", path).features


def _glyph_weights(folder: Path) -> Path:
    (folder / "any.safetensors").write_bytes(WEIGHTS.read_bytes())
    return folder / "any.safetensors"


def _inspected(path: Path) -> Any:
    found = contents(path)
    return found.kind, found.text()


def _ledger(path: Path) -> Any:
    return len(Ledger(path).torn)


TARGETS = {
    "adapters into a plain model": Target(_adapters, _load, checked=True),
    "adapters into adapters": Target(_adapters, _load_into, checked=True),
    "PEFT's weights": Target(_peft("adapter_model.safetensors"), _import),
    "PEFT's config": Target(_peft("adapter_config.json"), _import),
    "checkpoint": Target(_checkpoint, _resume, checked=True),
    "summary": Target(_summary, read_summary),
    "ledger": Target(_experiment(".ledger.jsonl"), _ledger),
    "experiment": Target(_experiment(".toml"), read_experiment),
    "CIFAR-100, binary": Target(_cifar_binary, _cifar),
    "CIFAR-100, a batch": Target(_cifar_python("train"), _cifar),
    "CIFAR-100, its names": Target(_cifar_python("meta"), _cifar),
    **{
        f"a picture, {format}": Target(_picture(format, suffix), _folder)
        for format, suffix in (("PNG", ".png"), ("JPEG", ".jpg"), ("GIF", ".gif"), ("TIFF", ".tif"), ("WEBP", ".webp"))
    },
    "a domain's list": Target(_domain_list, _domains),
    "weights in safetensors": Target(_weights(".safetensors"), _backbone),
    "weights of torch": Target(_weights(".pth"), _backbone),
    "a call in CIFAR-100": Target(_call_in_cifar, _cifar, refused=True),
    "a call in weights": Target(_call_in_weights, _backbone, refused=True),
    "inspect": Target(_glyph_weights, _inspected),
}


def quietly(read: Callable[[Path], Any], path: Path) -> Any:
    """What is read, without a word on the terminal."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        return read(path)
