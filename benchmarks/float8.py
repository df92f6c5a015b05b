"""What a base in 8 bits costs in accuracy, on real weights and images.

    python -m benchmarks.float8 --data-dir DIR --weights deit_tiny_patch16_224.safetensors

prints the relative error of the output of each kind of layer, ‖y₈ − y‖ / ‖y‖ for the same x, over the blocks; then that
of the features with all of these layers in 8 bits. In a federation,

    hilora train --strategy hilora benchmarks.float8:Float8HiLoRA ...

trains HiLoRA beside the base as it is, and in 8 bits. Without a GPU of sm_89 or later the arithmetic is emulated.
"""

from __future__ import annotations

import argparse
import copy
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

import hilora
from benchmarks.timing import DEVICE
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import adapted_layers
from hilora.federated.data.images import prepare
from hilora.federated.data.readers import read_images
from hilora.federated.settings import TrainingSettings
from hilora.federated.strategies.hilora import HiLoRA
from hilora.models.backbone import Backbone, load_backbone

MODEL = "deit_tiny_patch16_224"


class Float8HiLoRA(HiLoRA):
    """HiLoRA beside a base in 8 bits."""

    name = "hilora-float8"

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        return replace(super().adapters(training), base_dtype="float8_e4m3fn")


def errors(backbone: Backbone, images: Tensor) -> tuple[dict[str, list[float]], float]:
    """Relative errors by kind of layer, one a block, and that of the features.

    Args:
        backbone: of timm.
        images: `[n, 3, size, size]`, normalised.
    """
    model, narrow = backbone.model.eval(), copy.deepcopy(backbone.model).eval()
    config = HiLoRAConfig(target_modules="all-linear", modules_to_save=(), base_dtype="float8_e4m3fn")
    layers = adapted_layers(hilora.inject(narrow, config))
    found: dict[str, list[float]] = defaultdict(list)
    hooks = []
    for path, layer in layers.items():

        def compare(_: nn.Module, given: tuple[Tensor], y: Tensor, path=path, layer=layer) -> None:
            found[path.split(".", 2)[-1]].append(relative(layer(given[0]), y))

        hooks.append(model.get_submodule(path).register_forward_hook(compare))
    with torch.inference_mode():
        features = model(images)
        for hook in hooks:
            hook.remove()
        return found, relative(narrow(images), features)


def relative(got: Tensor, want: Tensor) -> float:
    """‖got − want‖ / ‖want‖."""
    return float((got - want).norm() / want.norm())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="CIFAR-100")
    parser.add_argument("--weights", type=Path, help=f"of {MODEL}; default: from timm's hub")
    parser.add_argument("--images", type=int, default=64, help="the first of the test images (%(default)s)")
    given = parser.parse_args(arguments)
    backbone = load_backbone(MODEL, given.weights)
    _, test = read_images(given.data_dir, backbone.size, 0)
    pixels = test.images[torch.arange(given.images)].to(DEVICE)
    backbone.model.to(DEVICE)
    mean, std = backbone.mean.to(DEVICE), backbone.std.to(DEVICE)
    of_layers, of_features = errors(backbone, prepare(pixels, backbone.size, mean, std, torch.float32))
    print(f"{MODEL}, {given.images} images at {backbone.size} px: relative error of the output")
    print(f"{'layer':12}{'blocks':>8}{'min':>9}{'median':>9}{'max':>9}")
    for kind, each in of_layers.items():
        print(f"{kind:12}{len(each):>8}{min(each):9.2%}{median(each):9.2%}{max(each):9.2%}")
    print(f"features, all of these layers in 8 bits: {of_features:.2%}")


if __name__ == "__main__":
    main()
