"""Whether a model really calls the layers that were adapted.

Some ViTs of timm (BEiT, EVA-02, Swin-V2, those with rotary embeddings) compute with `self.qkv.weight` and never call
`self.qkv`: adapters there would be silently without effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class UncalledLayerError(ValueError):
    """Adapters were put where the model never looks."""


class _CallCheck:
    """Hooks that watch one forward pass of the model and then take themselves away."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
        self.uncalled = list(layers)
        self.handles = [layer.register_forward_pre_hook(partial(self.called, path)) for path, layer in layers.items()]
        self.handles.append(model.register_forward_hook(self.finished))

    def called(self, path: str, layer: nn.Module, args: Any) -> None:
        if path in self.uncalled:
            self.uncalled.remove(path)

    def finished(self, model: nn.Module, args: Any, output: Any) -> None:
        self.remove()
        if self.uncalled:
            raise UncalledLayerError(
                f"the model never calls {len(self.uncalled)} of the adapted layers ({', '.join(self.uncalled[:3])}…): "
                "it uses their weights in some other way, so that adapters would have no effect. Choose other "
                "target_modules, such as 'proj', 'fc1', 'fc2', or a model that calls them"
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
    image = example_input if example_input is not None else _example_input(model)
    if image is None:
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(image)
    except BaseException as error:
        guessed_wrong = example_input is None and isinstance(error, Exception)
        if isinstance(error, UncalledLayerError) or not guessed_wrong:
            check.remove()
            raise
    finally:
        for module, mode in modes.items():
            module.training = mode


def end_check(model: nn.Module) -> None:
    """Take the hooks of a check out that waits for the model's first forward pass."""
    for hook in list(model._forward_hooks.values()):
        check = getattr(hook, "__self__", None)
        if isinstance(check, _CallCheck):
            check.remove()


def _example_input(model: nn.Module) -> Tensor | None:
    """One blank image for a ViT of timm, transformers or torchvision; None for other models."""
    stem = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    size: Any = getattr(getattr(model, "patch_embed", None), "img_size", None)  # timm
    if size is None and isinstance(getattr(model, "default_cfg", None), Mapping):
        size = model.default_cfg["input_size"][1:]  # type: ignore[index]
    elif size is None:  # transformers, torchvision
        size = getattr(getattr(model, "config", model), "image_size", None)
    if stem is None or size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return torch.zeros(1, stem.in_channels, height, width, device=stem.weight.device, dtype=stem.weight.dtype)
