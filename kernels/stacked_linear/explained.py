"""What `explain` says of the table of devices. Triton is imported when it is asked, not before."""

from __future__ import annotations

from torch import Tensor


def row(x: Tensor, *_: object) -> str:
    """Which row serves a call on x."""
    from .devices import INTERPRETER, PATH, device

    found = device(x.device)
    return f"in {found.name}" if found is INTERPRETER else f"by the row {found.name} of {PATH.name}, {found.source}"
