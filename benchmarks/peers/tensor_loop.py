"""The loop over clients at its best: the ViT of transformers under PEFT, on images that are tensors already."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.federation import Federation
from benchmarks.peers.peft_loop import PeftLoop
from hilora.federated.data.images import ImageSet, prepare
from hilora.models.backbone import Backbone

NAMES = {  # of timm's parameters, in transformers 5
    r"^cls_token": "embeddings.cls_token",
    r"^pos_embed": "embeddings.position_embeddings",
    r"^patch_embed\.proj": "embeddings.patch_embeddings.projection",
    r"^blocks\.": "layers.",
    r"norm1": "layernorm_before",
    r"norm2": "layernorm_after",
    r"attn\.proj": "attention.o_proj",
    r"attn\.([qkv])\.": r"attention.\1_proj.",
    r"^norm\.": "layernorm.",
}


class TensorLoop(PeftLoop):
    """`PeftLoop` without its loading of data.

    Args:
        federation: the clients, with adapters on q and v; their images are prepared once, here.
        tuned: forward passes under autocast to bf16, instead of fp32.
        attention: of transformers, `eager` or `sdpa`.
    """

    targets: ClassVar[list[str]] = ["q_proj", "v_proj"]

    def __init__(self, federation: Federation, tuned: bool, attention: str) -> None:
        self.attention = attention
        super().__init__(federation, tuned=tuned)
        backbone, everyone = federation.backbone, torch.arange(len(federation.images))
        self.pixels = prepare(
            federation.images.images[everyone], backbone.size, backbone.mean, backbone.std, torch.float32
        )

    def base(self, backbone: Backbone) -> nn.Module:
        from transformers import ViTConfig, ViTModel

        theirs: Any = backbone.model
        config = ViTConfig(
            hidden_size=backbone.features,
            num_hidden_layers=len(theirs.blocks),
            num_attention_heads=theirs.blocks[0].attn.num_heads,
            intermediate_size=theirs.blocks[0].mlp.fc1.out_features,
            image_size=backbone.size,
            patch_size=theirs.patch_embed.patch_size[0],
            layer_norm_eps=theirs.norm.eps,
            attn_implementation=self.attention,
        )
        model: nn.Module = ViTModel(config, add_pooling_layer=False)
        model.load_state_dict(_renamed(theirs.state_dict()))
        return model

    def batches(self, images: ImageSet, order: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for part in order.split(self.settings.batch_size):
            yield self.pixels[part], images.labels[part]

    def features(self, pixels: Tensor) -> Tensor:
        found: Tensor = self.model(pixels).last_hidden_state[:, 0]
        return found


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of timm as transformers has it, `qkv` taken apart."""
    apart = {}
    for name, value in state.items():
        parts = zip("qkv", value.chunk(3), strict=True) if ".qkv." in name else [("qkv", value)]
        apart.update({name.replace(".qkv.", f".{part}."): piece for part, piece in parts})
    for pattern, theirs in NAMES.items():
        apart = {re.sub(pattern, theirs, name): value for name, value in apart.items()}
    return apart
