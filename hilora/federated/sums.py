"""What clients changed of what they were sent, as tensors that can be added up; and messages made of such a sum."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable, Stack
from hilora.errors import InvalidValueError
from hilora.federated.protocol import Download, Rows, Upload


def stacks(upload: Upload) -> Iterator[tuple[str, Stack]]:
    """The adapters of each tier and the head of a message, by name."""
    yield from upload.tiers.items()
    if upload.head is not None:
        yield "head", upload.head


def start(download: Download, name: str, choice: Tensor | None = None) -> Stack | None:
    """What n clients were sent of a tier, or of the head, `[n, ...]`; None if they were sent none, or several and made
    no choice."""
    rows: Rows[Any] | None = download.head if name == "head" else download.tiers.get(name)
    if rows is None or (rows.slot.dim() > 1 and choice is None):
        return None
    found: Stack = (rows.picked(choice) if rows.slot.dim() > 1 and choice is not None else rows).taken()
    return found


def changes(upload: Upload, download: Download) -> dict[str, Tensor]:
    """What n clients changed: each tensor that they sent less what they were sent of it, `[n, ...]`, by tier and name.
    Of a tensor that they were not sent, all of it; of ranks and projections that they did not send, nothing."""
    found = {}
    for name, stack in stacks(upload):
        begun = start(download, name, upload.choice)
        if isinstance(stack, AdapterTable) and isinstance(begun, AdapterTable):
            begun = begun.leading(stack.rank)
            begun = begun.having(stack.has) if stack.has else begun
        before = {} if begun is None else begun.tensors()
        for key, value in stack.tensors().items():
            if value.is_floating_point():
                found[f"{name}.{key}"] = value - before[key].to(value) if key in before else value
    return found


def norms(changed: Mapping[str, Tensor], clients: int) -> Tensor:
    """The norm of all that each of n clients changed, float64 `[n]`."""
    squares = torch.zeros(clients, dtype=torch.float64)
    for value in changed.values():
        squares += value.double().flatten(1).square().sum(1).cpu()
    return squares.sqrt()


def groups(download: Download) -> Tensor:
    """Which of n clients were sent the same: a number for each, int64 `[n]`."""
    slots = [part.slot for part in download.parts()]
    if not slots:
        raise InvalidValueError("a download with nothing in it has no groups")
    number: Tensor = torch.stack(slots, 1).unique(dim=0, return_inverse=True)[1]
    return number


def spread(upload: Upload, download: Download, mean: Mapping[str, Tensor]) -> Upload:
    """Messages that say no more than a mean: every client's is its start and the mean change, `[n, ...]` by tier and
    name, in the ranks and projections that it sent, from one image each."""

    def alike(name: str, stack: Any) -> Any:
        begun = start(download, name)
        assert begun is not None
        before = begun.tensors()
        found = stack.like(
            {
                key: before[key].to(value) + mean[f"{name}.{key}"] if value.is_floating_point() else value
                for key, value in stack.tensors().items()
            }
        )
        if isinstance(found, AdapterTable):
            found = found.leading(found.rank)
            found = found.having(found.has) if found.has else found
        return found

    found = {name: alike(name, stack) for name, stack in stacks(upload)}
    head = found.pop("head", None)
    return Upload(upload.clients, torch.ones_like(upload.images), found, head)
