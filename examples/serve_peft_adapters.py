"""LoRA adapters that PEFT trained, served together: one batch, a different adapter for each of its images.

python examples/serve_peft_adapters.py
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import timm
import torch
from torch import nn

import hilora


def backbone() -> nn.Module:
    """The pretrained ViT that all adapters are of."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, num_classes=10).eval()
    return model


def adapters_of_peft(folder: Path, count: int) -> list[Path]:
    """Folders as `save_pretrained` of PEFT leaves them."""
    found = []
    for number in range(count):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["qkv"], init_lora_weights=False)
        peft.get_peft_model(backbone(), config).save_pretrained(str(folder / str(number)))
        found.append(folder / str(number))
    return found


def main() -> None:
    images = torch.randn(3, 3, 32, 32)
    with TemporaryDirectory() as place, torch.no_grad():
        folders = adapters_of_peft(Path(place), 3)
        alone = [
            peft.PeftModel.from_pretrained(backbone(), str(folder)).eval()(images[i : i + 1])
            for i, folder in enumerate(folders)
        ]
        model = backbone()
        hilora.inject(model, hilora.HiLoRAConfig(r=4, tiers=("task",), slots=3, target_modules=("qkv",)))
        for slot, folder in enumerate(folders):
            hilora.import_peft(model, folder, tier="task", slot=slot)
        hilora.set_slots(model, task=torch.tensor([0, 1, 2]))  # which one each of the three images gets
        together = model(images)
    print(f"three adapters in one batch: outputs differ by at most {(together - torch.cat(alone)).abs().max():.1e}")


if __name__ == "__main__":
    main()
