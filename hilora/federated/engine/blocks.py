"""The blocks of a ViT that hold its adapters: which of them clients train, and which they have at all."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hilora.adapters.bank import AdapterBank
from hilora.errors import InvalidValueError


class Parts(NamedTuple):
    """What n clients train of a model of L blocks.

    Attributes:
        trained: bool `[n, L]`, the blocks whose adapters are trained; the others take part, and stay as they are.
        present: bool `[n, L]`, the blocks that a client has while it trains: one that it lacks passes on what it gets,
            and its adapters are not trained either. None: all.
    """

    trained: Tensor
    present: Tensor | None = None

    @classmethod
    def having(cls, present: Tensor) -> Parts:
        """Clients that have these blocks alone, and train them."""
        return cls(present, present)

    def of(self, clients: Tensor) -> Parts:
        """The same for some of the n clients, by their places `[m]`."""
        return Parts(self.trained[clients], None if self.present is None else self.present[clients])


class Blocks:
    """The blocks of a model, in their order.

    Args:
        model: with adapters; each of its blocks is a residual one: it gives what it gets, and something added.
        banks: its adapters.

    Attributes:
        paths: of the L blocks.
        of: for each bank, int64 `[P]`, the block of each projection.
        gate: bool `[G, L]`, the blocks that the rows of G clients go through; None: all.
    """

    def __init__(self, model: nn.Module, banks: Sequence[AdapterBank]) -> None:
        names = [[_block(name) for name in bank.names] for bank in banks]
        found = {path for some in names for path in some}
        self.paths = [path for path, _ in model.named_modules() if path in found]
        place = {path: index for index, path in enumerate(self.paths)}
        self.of = [torch.tensor([place[path] for path in some]) for some in names]
        self.gate: Tensor | None = None
        for index, path in enumerate(self.paths):
            model.get_submodule(path).register_forward_hook(_passing(self, index))

    def __len__(self) -> int:
        """L."""
        return len(self.paths)

    def check(self, parts: Parts, clients: int) -> None:
        """Raise an InvalidValueError unless they are of so many clients and of these blocks."""
        for name, mask in parts._asdict().items():
            if mask is not None and (mask.shape != (clients, len(self)) or mask.dtype != torch.bool):
                raise InvalidValueError(
                    f"{name} {mask.dtype} {tuple(mask.shape)} does not fit: expected bool [{clients}, {len(self)}], "
                    "a row for each client and a column for each block"
                )


class PlacedParts:
    """The parts of G clients on the model's device, in tensors that stay where they are.

    Attributes:
        trained: for each bank, `[P, G, 1, 1]`, 1 where a client trains a projection's adapters and 0 where not.
        present: bool `[G, L]`; None: all.
    """

    def __init__(self, blocks: Blocks, parts: Parts, device: torch.device) -> None:
        self.of = blocks.of
        self.trained = [torch.empty(len(of), len(parts.trained), 1, 1, device=device) for of in self.of]
        self.present = None if parts.present is None else parts.present.to(device, copy=True)
        self.overwrite(parts)

    def overwrite(self, parts: Parts) -> None:
        """Take the values of other parts of as many clients."""
        for trained, of in zip(self.trained, self.of, strict=True):
            trained.copy_(parts.trained[:, of].T[..., None, None])
        if self.present is not None and parts.present is not None:
            self.present.copy_(parts.present)


def _passing(blocks: Blocks, index: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor | None]:
    """A hook that lets the rows of some clients pass a block by."""

    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if blocks.gate is None:
            return None
        x = inputs[0][:, : output.shape[1]]  # the last block may give the class token alone
        groups, rest = len(blocks.gate), [1] * (x.dim() - 1)
        there = blocks.gate[:, index, None].expand(groups, len(x) // groups).reshape(-1, *rest)
        return torch.where(there, output, x)

    return hook


def _block(name: str) -> str:
    """The path of the block that a projection is in: up to the last number before the layer's own name."""
    found = re.match(r"(.*\.\d+)\.", name)
    return found[1] if found else name
