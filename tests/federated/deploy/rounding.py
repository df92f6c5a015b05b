"""What is equal but for rounding where the same training runs in two places.

A sum's order depends on the processor and on where memory lies. AdamW makes much of that: it divides a gradient that is
nothing but rounding by its own size. With an eps above such gradients the difference stays as small as it was.
"""

from __future__ import annotations

from functools import partialmethod
from typing import Any

import pytest
import torch

from hilora.adapters.table import AdapterTable
from hilora.federated.engine.optim import SlotAdamW
from tests.federated.test_federation import tensors

EPS = 1e-3
STEADY_APP = f"""
from functools import partialmethod

from hilora.federated.engine.optim import SlotAdamW

SlotAdamW.__init__ = partialmethod(SlotAdamW.__init__, eps={EPS})
"""
"""For the end of a client's app: what `steady` does here."""


def steady(patch: pytest.MonkeyPatch) -> None:
    """Train with AdamW's eps at 1e-3."""
    patch.setattr(SlotAdamW, "__init__", partialmethod(SlotAdamW.__init__, eps=EPS))


def products(table: AdapterTable) -> list[torch.Tensor]:
    """B A of each row and projection: what is left of factors whose basis an SVD chose."""
    return [B @ A for A, B in table.factors]


def close(one: Any, other: Any) -> None:
    """Two states have the same tensors, each to a thousandth of its norm."""
    left, right = dict(tensors(one)), dict(tensors(other))
    assert left.keys() == right.keys()
    for name, value in left.items():
        there = right[name]
        assert (value.shape, value.dtype) == (there.shape, there.dtype), name
        if value.is_floating_point():
            assert (value - there).norm() <= 1e-3 * there.norm() + 1e-6, name
        else:
            assert torch.equal(value, there), name
