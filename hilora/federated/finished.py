"""The clients' models of a finished run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.injection import set_active_tier, set_slots
from hilora.adapters.io.files import read_tensors
from hilora.adapters.io.native import load_adapters
from hilora.errors import FileError, InvalidValueError
from hilora.models.backbone import load_backbone
from hilora.models.heads import find_heads
from hilora.reporting.summary import read_summary


def load_client(
    run: str | os.PathLike[str],
    client: int,
    /,
    backbone: str | None = None,
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """The ViT that a client of a finished run predicts with: adapters injected, its own path through the tiers chosen,
    its head in place.

    The adapters of the other clients are there, too, for `hilora.set_slots`. The last tier of the path is set to train.

    Args:
        run: the folder of a run, with `summary.json`, `adapters.safetensors` and `heads.safetensors`.
        client: its id, from 0 on; unseen clients have one, too.
        backbone: its name, where the summary does not say it, or it has another one here.
        weights: a file of the backbone's, where it lies elsewhere than at the run's time.

    Returns:
        A model of timm in eval mode, images `[n, 3, h, w]`, normalised, → logits `[n, classes]`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: for a folder that is not of a finished run, other weights than the run's, a client that the run does
            not have, or a method whose tiers are not added.
    """
    model, slots = with_path(Path(run), client, backbone, None if weights is None else Path(weights))
    set_slots(model, **{tier: torch.tensor([slot]) for tier, slot in slots.items()})
    set_active_tier(model, [tier for tier, slot in slots.items() if slot >= 0][-1])
    return model.eval()


def with_path(
    run: Path, client: int, backbone: str | None = None, weights: Path | None = None
) -> tuple[nn.Module, dict[str, int]]:
    """The ViT of a run with a client's head and the adapters of all clients, and which of these are the client's.

    Raises:
        ValueError: as `load_client`.
    """
    asked = read_summary(run / "summary.json").get("arguments", {})
    heads, described = read_tensors(run / "heads.safetensors")
    rows = _rows(run, client, described.get("models"))
    name, file = backbone or asked.get("backbone"), weights or (asked.get("weights") and Path(asked["weights"]))
    if name is None:
        raise InvalidValueError(f"{run / 'summary.json'} does not say which backbone the run had: give backbone")
    model = with_classifier(name, file, asked.get("img_size"), len(described["classes"]))
    load_adapters(model, run / "adapters.safetensors")
    _put_head(model, heads, rows)
    return model, rows["slots"]


def with_classifier(backbone: str, weights: Path | None, size: int | None, classes: int) -> nn.Module:
    """A pretrained ViT with a fresh classifier, or without one for 0 classes."""
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
        raise InvalidValueError(f"client {client}: {run} has clients 0 to {count - 1}")
    slots = {tier: each[client] for tier, each in models["slots"].items()}
    return {"slots": slots, "tier": list(slots)[-1], "head": models["head"][client]}


def _put_head(model: nn.Module, heads: Mapping[str, Tensor], rows: Mapping[str, Any]) -> None:
    (head,) = find_heads(model)
    own = {name: heads[f"{rows['tier']}.{name}"][rows["head"]] for name in ("weight", "bias")}
    head.load_state_dict(own)
