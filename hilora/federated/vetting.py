"""Whether what a client sent is what it was asked for."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import Download, Upload
from hilora.federated.sums import changes, norms, stacks


def vet(
    upload: Upload, expected: Upload, download: Download | None = None, bound: float | None = None
) -> list[str | None]:
    """The reason, in words, why each of n clients' messages cannot be used; None where it can.

    Args:
        upload: what they sent.
        expected: a message of the right tables, shapes, dtypes and ranks; its values do not count
            (`Strategy.expected`).
        download: what they were sent, in the same order; for the norm.
        bound: how large the norm of all that a client changed may be, A, B and head as one vector; None: any.
    """
    misfit = layout(upload, expected)
    if misfit is not None:
        return [misfit] * len(upload.clients)
    reasons: list[str | None] = [None] * len(upload.clients)

    def leave_out(bad: torch.Tensor, reason: str) -> None:
        for place in bad.nonzero().flatten().tolist():
            reasons[place] = reasons[place] or reason

    for name, stack in stacks(upload):
        leave_out(~stack.finite().cpu(), f"{name} is not finite")
        if isinstance(stack, AdapterTable):
            least, most = stack.rank < 0, stack.rank > expected.tiers[name].r
            leave_out(least | most, f"{name} has a rank beyond {expected.tiers[name].r}")
    if upload.scores is not None:
        good = (upload.scores >= 0).all(1) & upload.scores.isfinite().all(1)
        leave_out(~good, "scores that are no numbers of at least 0")
    leave_out(upload.images < 0, "a negative number of images")
    if upload.choice is not None and expected.choice is not None:
        choices = int(expected.choice.max()) + 1
        leave_out((upload.choice < 0) | (upload.choice >= choices), f"a choice that is none of {choices}")
    if bound is not None and download is not None:
        usable = torch.tensor([reason is None for reason in reasons])
        some = upload.rows(usable)
        sizes = torch.zeros(len(reasons), dtype=torch.float64)
        sizes[usable] = norms(changes(some, download.of(usable.nonzero().flatten())), len(some.clients))
        for place in (sizes > bound).nonzero().flatten().tolist():
            reasons[place] = f"its change has a norm of {sizes[place]:.4g}, more than {bound:g}"
    return reasons


def layout(upload: Upload, expected: Upload) -> str | None:
    """The reason why messages of this layout cannot be used: their tables, shapes or dtypes; None where they can."""
    found, wanted = dict(stacks(upload)), dict(stacks(expected))
    if found.keys() != wanted.keys():
        return f"it has {_listed(found)}, expected {_listed(wanted)}"
    if (upload.choice is None) != (expected.choice is None):
        return "it names a choice, expected none" if expected.choice is None else "it names no choice, expected one"
    if (upload.scores is None) != (expected.scores is None):
        return "it has scores, expected none" if expected.scores is None else "it has no scores, expected some"
    if upload.scores is not None and expected.scores is not None:
        shape = (len(upload.clients), expected.scores.shape[1])
        if upload.scores.dtype != torch.float32 or upload.scores.shape != shape:
            return f"scores is {upload.scores.dtype} {list(upload.scores.shape)}, expected torch.float32 {list(shape)}"
    for label, value in (("clients", upload.clients), ("images", upload.images), ("choice", upload.choice)):
        if value is not None and (value.dtype != torch.int64 or value.shape != upload.clients.shape):
            return f"{label} is {value.dtype} {list(value.shape)}, expected int64 {list(upload.clients.shape)}"
    for name, stack in found.items():
        tensors, right = stack.tensors(), wanted[name].tensors()
        if tensors.keys() != right.keys():
            return f"{name} has {_listed(tensors)}, expected {_listed(right)}"
        for key, value in tensors.items():
            shape = (len(upload.clients), *right[key].shape[1:])
            if value.dtype != right[key].dtype or tuple(value.shape) != shape:
                expects = f"{right[key].dtype} {list(shape)}"
                return f"{name}.{key} is {value.dtype} {list(value.shape)}, expected {expects}"
    return None


def _listed(names: Mapping[str, object]) -> str:
    return ", ".join(names) or "nothing"
