"""Tier: one tier of low-rank adapters on a linear layer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from ..errors import InvalidValueError

T = TypeVar("T")


class Tier(NamedTuple):
    """One tier of low-rank adapters on a linear layer, `scale * B A`, as a table of S adapters.

    Attributes:
        A: `[S, r, in]`, how much to adapt.
        B: `[S, width, r]`, in which directions.
        scale: lora_alpha / r.
        slot: integer `[G]` on the device of x, which of the S adapters each group of rows uses; -1 for none. Without
            it, all groups use the only adapter (S = 1), or group g uses adapter g (S = G). A table may be empty
            (S = 0): no effect.
        columns: `(start, width)` of the layer's output that the tier adds to; all of it by default.
        gain: what the tier's output is multiplied by for each row of x, of x's shape without its last dimension; it may
            depend on x. Only `reference` has it.
        ranks: integer `[S]` on the device of x, how many rows of A and columns of B of each adapter are in use; all by
            default. What lies beyond has no effect, and a gradient of zero.
        slot_scales: fp32 `[S]` on the device of x, what each adapter is multiplied by beside `scale`; by default 1.
    """

    A: Tensor
    B: Tensor
    scale: float
    slot: Tensor | None = None
    columns: tuple[int, int] | None = None
    gain: Tensor | None = None
    ranks: Tensor | None = None
    slot_scales: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[1]

    @property
    def tells_groups_apart(self) -> bool:
        count = self.A.shape[0]
        return count > 1 or (count == 1 and self.slot is not None)


class Tiers(tuple[Tier, ...]):
    """The tiers of a layer call after call, with what was found out about them last, their values aside: by name, and
    for which shapes. Tiers `like` these know it, too."""

    def __new__(cls, tiers: Iterable[Tier], like: Tiers | None = None) -> Self:
        return super().__new__(cls, tiers)

    def __init__(self, tiers: Iterable[Tier], like: Tiers | None = None) -> None:
        self.slotless: bool = all(tier.slot is None for tier in self)
        self._known: dict[str, tuple[tuple[Hashable, ...], Any]] = {} if like is None else like._known

    def with_factors(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> Tiers:
        """The same with an A and a B each; these ones where they have them."""
        given = list(pairs)
        if all(A is tier.A and B is tier.B for tier, (A, B) in zip(self, given, strict=True)):
            return self
        alike = all(
            A.shape == tier.A.shape and B.shape == tier.B.shape for tier, (A, B) in zip(self, given, strict=True)
        )
        tiers = [tier._replace(A=A, B=B) for tier, (A, B) in zip(self, given, strict=True)]
        return Tiers(tiers, self if alike else None)

    def recall(self, name: str, key: tuple[Hashable, ...], find: Callable[..., T], *arguments: Any) -> T:
        """What `find(*arguments)` gives, which depends on no more than the tiers, their values aside, and the key."""
        known = self._known.get(name)
        if known is None or known[0] != key:
            known = self._known[name] = key, find(*arguments)
        found: T = known[1]
        return found


def check(x: Tensor, weight: Tensor, bias: Tensor | None, tiers: Sequence[Tier]) -> None:
    """Raise an InvalidValueError unless all shapes fit together."""
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        raise InvalidValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias {None if bias is None else tuple(bias.shape)} "
            "do not fit: expected [..., in], [out, in] and [out] or None"
        )
    shape, (out, width_in) = x.shape, weight.shape
    for tier in tiers:
        _check_tier(tier, shape, out, width_in)


def _check_tier(tier: Tier, x: torch.Size, out: int, width_in: int) -> None:
    A, B, _, slot, columns, gain, ranks, scales = tier
    start, width = columns or (0, out)
    slots, rank, width_A = A.shape if A.dim() == 3 else (0, 0, -1)
    if width_A != width_in or B.shape != (slots, width, rank):
        raise InvalidValueError(
            f"A {tuple(A.shape)} and B {tuple(B.shape)} do not fit: expected A [S, r, {width_in}] and "
            f"B [S, {width}, r] for a weight {(out, width_in)} and {width} columns"
        )
    if start < 0 or start + width > out:
        raise InvalidValueError(f"columns (start {start}, width {width}) reach outside of the {out} outputs")
    if slot is not None and (slot.dim() != 1 or slot.dtype not in _INTEGERS):
        raise InvalidValueError(f"slot must hold integers [G], got {slot.dtype} {tuple(slot.shape)}")
    if ranks is not None and (ranks.shape != (slots,) or ranks.dtype not in _INTEGERS):
        raise InvalidValueError(f"ranks must hold integers [{slots}], got {ranks.dtype} {tuple(ranks.shape)}")
    if scales is not None and (scales.shape != (slots,) or scales.dtype != torch.float32):
        raise InvalidValueError(f"slot_scales must be fp32 [{slots}], got {scales.dtype} {tuple(scales.shape)}")
    if gain is not None and gain.shape != x[:-1]:
        raise InvalidValueError(f"gain {tuple(gain.shape)} must have a value for each row of x {tuple(x)}")
    if slots > 1 or (slots == 1 and slot is not None):
        groups = slots if slot is None else slot.shape[0]
        if len(x) != 3 or x[0] != groups:
            raise InvalidValueError(f"x {tuple(x)} must be [G, M, in] with G = {groups}, as the tier's slots say")


_INTEGERS = (torch.int32, torch.int64)
