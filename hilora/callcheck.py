"""Whether a model really calls the layers that were adapted.

Some ViTs of timm (BEiT, EVA-02, Swin-V2, those with rotary embeddings) compute with `self.qkv.weight` and never call
`self.qkv`: adapters there would be silently without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class UncalledLayerError(ValueError):
    """Adapters were put where the model never looks."""


class _CallCheck:
    """Hooks that watch one forward pass of the model and then take themselves away."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.uncalled = {id(layer): path for path, layer in layers.items()}
        self.handles = [layer.register_forward_pre_hook(self.called) for layer in layers.values()]
        self.handles.append(model.register_forward_hook(self.finished))

    def called(self, layer: nn.Module, args: Any) -> None:
        self.uncalled.pop(id(layer), None)

    def finished(self, model: nn.Module, args: Any, output: Any) -> None:
        self.remove()
        if self.uncalled:
            some = ", ".join(list(self.uncalled.values())[:3])
            raise UncalledLayerError(
                f"the model never calls {len(self.uncalled)} of the adapted layers ({some}…): it uses their weights in "
                "some other way, so that adapters would have no effect. Choose other target_modules, such as 'proj', "
                "'fc1', 'fc2', or a model that calls them"
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def check_calls(model: nn.Module, layers: Mapping[str, nn.Module], example_input: Tensor | None = None) -> None:
    """Run the model once and see that it calls each of `layers`; where it is not known what the model takes, watch its
    first forward pass instead.

    Raises:
        UncalledLayerError: if a layer is never called; now, or from that first forward pass.
    """
    check = _CallCheck(model, layers)
    derived = example_input is None
    if example_input is None:
        example_input = _example_input(model)
    if example_input is None:
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(example_input)
    except UncalledLayerError:
        raise
    except Exception:  # the blank image is not what this model takes: its first forward pass will tell
        if not derived:
            check.remove()
            raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def _example_input(model: nn.Module) -> Tensor | None:
    """One blank image for a ViT of timm, transformers or torchvision; None for other models."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    size: Any = None
    if hasattr(model, "default_cfg"):  # timm
        size = getattr(getattr(model, "patch_embed", None), "img_size", None) or model.default_cfg["input_size"][1:]  # type: ignore[index]
    elif hasattr(model, "config"):  # transformers
        size = getattr(model.config, "image_size", None)
    elif hasattr(model, "image_size"):  # torchvision
        size = model.image_size
    if stem is None or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, stem.in_channels, height, width, device=stem.weight.device, dtype=stem.weight.dtype)
