"""Small random models, and adapters that do something."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import hilora
from hilora.adapters.injection import banks

TIERS = ("root", "cluster", "leaf")
CONFIG = hilora.HiLoRAConfig(r={"root": 3, "cluster": 2, "leaf": 1}, lora_alpha={"root": 6, "cluster": 2, "leaf": 2})


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vit(seed: int = 0, **fields: Any) -> VisionTransformer:
    """A ViT of timm with two blocks of width 24 for images `[3, 16, 16]` and 5 classes."""
    torch.manual_seed(seed)
    given = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | fields
    return VisionTransformer(**given).eval()


def injected(config: hilora.HiLoRAConfig = CONFIG, seed: int = 0, **fields: Any) -> VisionTransformer:
    """The same with adapters that do something, in all tiers."""
    model = vit(seed, **fields)
    hilora.inject(model, config)
    randomise(model, seed)
    return model


def images(count: int, size: int = 16, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return random(count, 3, size, size, seed=seed, dtype=dtype)


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0, scale: float = 0.3) -> None:
    """Random adapters in place of those without effect."""
    tables = [(bank, tier) for bank in banks(model) for tier in bank.tiers]
    for index, (bank, tier) in enumerate(tables):
        bank.assign(
            tier,
            *(
                random(*factor.shape, seed=100 * seed + 2 * index + i, dtype=factor.dtype) * scale
                for i, factor in enumerate((bank.A(tier), bank.B(tier)))
            ),
        )


def values(model: nn.Module) -> list[Tensor]:
    """A and B of all tiers of all banks, as copies: `[P, S, r, in]`, `[P, S, out, r]`."""
    return [
        factor(tier).detach().clone() for bank in banks(model) for factor in (bank.A, bank.B) for tier in bank.tiers
    ]


def gradients(model: nn.Module) -> list[Tensor]:
    """Their gradients likewise, zero where there is none."""
    found = []
    for bank in banks(model):
        for factor, name in ((bank.A, "lora_A"), (bank.B, "lora_B")):
            for tier in bank.tiers:
                parameters = [getattr(layer, name)[tier] for layer in bank.layers]
                each = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
                found.append(torch.cat([grad.flatten() for grad in each]).view(factor(tier).shape))
    return found


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as it was, after an error."""
    return {
        "state": {name: (id(value), value.clone()) for name, value in model.state_dict(keep_vars=True).items()},
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "attributes": sorted(model.__dict__),
    }


def same(a: Any, b: Any) -> bool:
    """Equality to the bit, also of tensors inside of lists and dictionaries."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    found = y if isinstance(y, Tensor) else y.logits
    assert isinstance(found, Tensor)
    return found


def compiled(model: nn.Module) -> nn.Module:
    """The model as torch.compile wraps it."""
    wrapped: Any = torch.compile(model, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped
