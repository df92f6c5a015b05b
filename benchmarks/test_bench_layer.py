"""An adapted layer against the frozen layer alone and against a loop over adapters, side by side in one run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import hilora
from benchmarks.timing import Step, interleaved

ROWS = 8 * 197


class LoopLoRA(nn.Module):
    """What PEFT does with several active adapters: a loop of small products around a frozen layer."""

    def __init__(self, base: nn.Linear, tiers: int, rank: int, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.A = nn.ModuleList(nn.Linear(base.in_features, rank, bias=False) for _ in range(tiers))
        self.B = nn.ModuleList(nn.Linear(rank, base.out_features, bias=False) for _ in range(tiers))
        self.requires_grad_(False)
        for factor in (self.A[-1], self.B[-1]):
            factor.requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        for A, B in zip(self.A, self.B, strict=True):
            y = y + B(A(x)) * self.scale
        return y


def training_step(layer: nn.Module, width: int) -> Step:
    x = torch.randn(ROWS, width, requires_grad=True)
    return lambda: layer(x).sum().backward()


@pytest.mark.parametrize("width", [192, 384, 768])
def test_training_step_of_a_layer(benchmark, width: int) -> None:
    """`extra_info` has the ratios; the timed function is the adapted layer."""
    torch.manual_seed(0)
    plain, loop_base, base = (nn.Linear(width, width).requires_grad_(False) for _ in range(3))
    ours = hilora.TieredLoRALinear(base, r=8, lora_alpha=16)
    hilora.set_active_tier(ours, "leaf")
    steps = {
        "frozen layer": training_step(plain, width),
        "loop over three adapters": training_step(LoopLoRA(loop_base, 3, 8, 2.0), width),
        "hilora, three tiers": training_step(ours, width),
    }
    seconds = interleaved(steps)
    ours_seconds = seconds.pop("hilora, three tiers")
    benchmark.extra_info.update({f"{name} / hilora": value / ours_seconds for name, value in seconds.items()})
    benchmark.pedantic(steps["hilora, three tiers"], rounds=5, warmup_rounds=1)
