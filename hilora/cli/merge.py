"""Write the ViT of one client of a run as plain weights: its adapters merged into the backbone, its head in place.

    hilora merge runs/demo/hilora --client 3 --out client-3.safetensors

The file is what timm loads: timm.create_model(NAME, num_classes=N, checkpoint_path="client-3.safetensors").
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hilora.adapters.io.files import read_tensors, serialised, write_files
from hilora.adapters.io.native import load_adapters
from hilora.adapters.merging import merge
from hilora.cli.fields import about
from hilora.errors import FileError, InvalidValueError
from hilora.models.backbone import load_backbone
from hilora.models.heads import find_heads
from hilora.reporting.progress import ending, say
from hilora.reporting.summary import read_summary


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("run", type=Path, metavar="RUN", help="the folder of a run")
    found.add_argument("--client", type=int, required=True, help="its id, from 0 on; unseen clients have one, too")
    found.add_argument("--out", type=Path, required=True, help="the file to write, such as client-3.safetensors")
    found.add_argument("--backbone", help="where the run's summary does not say it, or it has another name here")
    found.add_argument("--weights", type=Path, help="of the backbone, where they lie elsewhere than at the run's time")
    return found


def merged(run: Path, client: int, backbone: str | None = None, weights: Path | None = None) -> nn.Module:
    """The ViT `[n, 3, h, w]` → `[n, classes]` that a client of a run predicts with, without adapters; errors as
    `adapted`."""
    model, slots = adapted(run, client, backbone, weights)
    return merge(model, **slots)


def adapted(
    run: Path, client: int, backbone: str | None = None, weights: Path | None = None
) -> tuple[nn.Module, dict[str, int]]:
    """The ViT of a run with a client's head and the adapters of all clients, and which of these are the client's.

    Raises:
        MissingFileError, FileError: for a folder that is not of a finished run, or other weights than the run's.
        InvalidValueError: for a client that the run does not have, or a method whose tiers are not added.
    """
    asked = read_summary(run / "summary.json").get("arguments", {})
    heads, described = read_tensors(run / "heads.safetensors")
    rows = _rows(run, client, described.get("models"))
    name, file = backbone or asked.get("backbone"), weights or (asked.get("weights") and Path(asked["weights"]))
    if name is None:
        raise InvalidValueError(f"{run / 'summary.json'} does not say which backbone the run had: give --backbone")
    model = plain(name, file, asked.get("img_size"), len(described["classes"]))
    load_adapters(model, run / "adapters.safetensors")
    _put_head(model, heads, rows)
    return model, rows["slots"]


def plain(backbone: str, weights: Path | None, size: int | None, classes: int) -> nn.Module:
    """A pretrained ViT with a fresh classifier, or without one for 0 classes."""
    with about(backbone=backbone, weights=weights):
        model = load_backbone(backbone, weights, size).model
    model.reset_classifier(classes)  # type: ignore[operator]
    return model


def _rows(run: Path, client: int, models: Any) -> dict[str, Any]:
    """Which of the saved rows are the client's."""
    if not isinstance(models, Mapping):
        raise FileError(f"{run / 'heads.safetensors'} does not say which adapters are whose: it is of an older version")
    if models["composition"] is not None:
        raise InvalidValueError(
            f"the clients of {run} weigh their tiers by {models['composition']}, image by image: no weights do that"
        )
    count = len(models["head"])
    if not 0 <= client < count:
        raise InvalidValueError(f"--client {client}: {run} has clients 0 to {count - 1}")
    slots = {tier: each[client] for tier, each in models["slots"].items()}
    return {"slots": slots, "tier": list(slots)[-1], "head": models["head"][client]}


def _put_head(model: nn.Module, heads: Mapping[str, Tensor], rows: Mapping[str, Any]) -> None:
    (head,) = find_heads(model)
    own = {name: heads[f"{rows['tier']}.{name}"][rows["head"]] for name in ("weight", "bias")}
    head.load_state_dict(own)


def main(arguments: Sequence[str] | None = None, prog: str = "hilora merge") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        model = merged(args.run, args.client, args.backbone, args.weights)
        weights = model.state_dict()
        write_files({args.out: serialised(weights, {"format": "pt"})})
        say(f"{args.out}: {len(weights)} tensors, {sum(map(Tensor.numel, weights.values())):,} numbers")
        return 0

    return ending(work)
