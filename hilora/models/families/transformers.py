"""The ViTs of transformers, of its versions 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import nn

from hilora.models.registry import Family, pair

# An MLP's layers in SAM, PVT, DINOv3, DINOv2 with SwiGLU.
FIRST = ("lin1", "dense1", "up_proj", "gate_proj", "weights_in")
SECOND = ("lin2", "dense2", "down_proj", "weights_out")


class Transformers(Family):
    name = "transformers"
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {
        "q": ("query", "q_proj", "to_q", "projection_query", "queries.linear"),
        "k": ("key", "k_proj", "to_k", "projection_key"),
        "v": ("value", "v_proj", "to_v", "projection_value"),
        "qkv": ("queries_keys_values.linear",),  # LeViT
        "proj": ("o_proj", "out_proj", "attention.output.dense", "projection.linear", "attention.projection_layer"),
        "fc1": ("intermediate.dense", *(f"mlp.{end}" for end in FIRST), "linear_up.linear", "linear1"),
        "fc2": (
            "[0-9].output.dense",
            "[0-9][0-9].output.dense",
            *(f"mlp.{end}" for end in SECOND),
            "linear_down.linear",
            "linear2",
        ),
    }

    def owns(self, model: nn.Module) -> bool:
        return hasattr(getattr(model, "config", None), "image_size")

    def title(self, model: nn.Module) -> str:
        return getattr(model.config, "name_or_path", "") or super().title(model)

    def heads(self, model: nn.Module) -> list[nn.Module]:
        base = getattr(model, "base_model", model)
        if base is model:
            return super().heads(model)
        # What a model for a task has beside the pretrained one, but for the decoder that came with its pretraining.
        return [child for name, child in model.named_children() if child is not base and name != "decoder"]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        return pair(model.config.image_size)  # type: ignore[union-attr]
