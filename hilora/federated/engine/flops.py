"""FLOPs of a client's training on one image, counted by what its budget lets it hold and train."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hilora.federated.engine.predictor import Predictor
from hilora.federated.engine.trainer import Effort


class Flops:
    """Counts products of matrices, a multiplication and an addition as two.

    A device of a client's budget is counted, not the simulation, which computes all clients at the width of the widest:

    - The frozen model's forward pass, block by block, counted once by `torch.utils.flop_counter`. A block that a client
      lacks counts nothing.
    - Its backward pass, counted likewise: gradients of activations alone, for nothing of it is trained; down to the
      first block with an adapter in training, this one included.
    - Adapters by the ranks that each client holds: `2 k (in + out)` a token forward, as much for the gradient of
      activations, and `2 k in` and `2 k out` for those of A and B where they are trained.
    - Tiers that a device would merge into its base model count nothing.
    - The head, forward and both gradients. What else lies outside of the blocks counts forward alone.

    Args:
        engine: the model and its adapters.
        classes: of the head.
        merged: the tiers that are merged.
    """

    def __init__(self, engine: Predictor, classes: int, merged: Collection[str] = ()) -> None:
        self.blocks, self.banks, self.merged = engine.blocks, engine.banks, merged
        model: Any = copy.deepcopy(engine.backbone.model).cpu().float().eval().requires_grad_(False)
        inputs: dict[str, Tensor] = {}
        for path in self.blocks.paths:
            model.get_submodule(path).register_forward_pre_hook(_keep(inputs, path))
        size = engine.backbone.size
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as whole:
            model(torch.zeros(1, 3, size, size, dtype=torch.float32))
        counts = [_counted(model.get_submodule(path), inputs[path]) for path in self.blocks.paths]
        forward, backward = zip(*counts, strict=True)
        self.forward, self.backward = (torch.tensor(one, dtype=torch.float64) for one in (forward, backward))
        self.tokens = torch.tensor([inputs[path].shape[:-1].numel() for path in self.blocks.paths])
        self.outside = whole.get_total_flops() - sum(forward) + 6 * engine.backbone.features * classes

    def image(self, effort: Effort) -> Tensor:
        """Of one image of each of n clients, float64 `[n]`."""
        present = torch.ones(len(effort.clients), len(self.blocks), dtype=torch.bool)
        trained = present & bool(effort.factors)
        if effort.parts is not None:
            present = present if effort.parts.present is None else effort.parts.present
            trained = trained & effort.parts.trained & present
        behind = trained.cumsum(1) > 0  # blocks that the backward pass reaches
        passes = present.double() + (present & behind)
        total: Tensor = self.outside + present.double() @ self.forward + (present & behind).double() @ self.backward
        for tier, ranks in effort.ranks.items():
            if tier in self.merged:
                continue
            for bank, of in zip(self.banks, self.blocks.of, strict=True):
                tokens, sides = self.tokens[of].double(), bank.in_features + bank.out_features
                total += 2 * ranks * sides * (passes[:, of] @ tokens)
                if tier in effort.trained:
                    own = bank.in_features * ("A" in effort.factors) + bank.out_features * ("B" in effort.factors)
                    total += 2 * ranks * own * (trained[:, of].double() @ tokens)
        return total


def _counted(block: nn.Module, x: Tensor) -> tuple[int, int]:
    """FLOPs of a frozen block, forward and backward."""
    x = x.detach().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        y = block(x.clone())  # the counter cannot do with a leaf
        forward = counter.get_total_flops()
        torch.autograd.grad(y.sum(), x)
    return forward, counter.get_total_flops() - forward


def _keep(inputs: dict[str, Tensor], path: str) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs[path] = args[0]

    return hook
