"""AdapterTable: the one container of adapters, in a bank, in a strategy's state, in a message and in a file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from hilora.errors import InvalidValueError


class Stack(ABC):
    """Tensors `[S, ...]` with one S: a row each for S adapters, heads, or whatever else a client can have one of.

    Operations give new stacks; only `put` writes into one.
    """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, as files and checkpoints have them."""

    @abstractmethod
    def like(self, tensors: dict[str, Tensor]) -> Self:
        """A stack of this kind with other tensors, under the names that `tensors` gives."""

    def __len__(self) -> int:
        """S."""
        return len(next(iter(self.tensors().values())))

    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The stack with every tensor of values changed."""
        return self.like({name: change(tensor) for name, tensor in self.tensors().items()})

    def rows(self, index: Tensor) -> Self:
        """A copy of some rows: `index` is int64 `[n]`, or a mask `[S]`."""
        return self.like({name: tensor[index.to(tensor.device)] for name, tensor in self.tensors().items()})

    def put(self, index: Tensor, rows: Self) -> None:
        """Write the rows `[n, ...]` in the places `index` `[n]`; a tensor that they lack stays as it is."""
        given = rows.tensors()
        for name, tensor in self.tensors().items():
            if name in given:
                tensor[index.to(tensor.device)] = given[name].to(tensor)

    def where(self, mask: Tensor, other: Self) -> Self:
        """Row by row from this stack where `mask` `[S]` says so, else from the other."""
        others = other.tensors()
        return self.like(
            {
                name: torch.where(
                    mask.to(tensor.device).view(-1, *[1] * (tensor.dim() - 1)), tensor, others[name].to(tensor)
                )
                for name, tensor in self.tensors().items()
            }
        )

    def mean(self, weights: Tensor) -> Self:
        """The weighted mean of the rows, tensor by tensor, as one row `[1, ...]`."""
        return self.each(lambda tensor: weighted_mean(tensor, weights))

    def repeated(self, count: int) -> Self:
        """The only row, `count` times, in memory of their own."""
        return self.rows(torch.zeros(count, dtype=torch.long))

    def to(self, device: torch.device) -> Self:
        return self.each(lambda tensor: tensor.to(device))

    def finite(self) -> Tensor:
        """Which rows are finite: bool `[S]`."""
        return torch.stack([tensor.isfinite()[:, None].flatten(1).all(1) for tensor in self.tensors().values()]).all(0)

    def nbytes(self) -> Tensor:
        """Bytes of each row, int64 `[S]`."""
        return torch.full((len(self),), sum(row_bytes(tensor) for tensor in self.tensors().values()))


def weighted_mean(tensor: Tensor, weights: Tensor) -> Tensor:
    """The mean of the rows of a tensor `[S, ...]` with weights `[S]`, as one row `[1, ...]`."""
    share = weights.double() / weights.sum()
    return torch.einsum("n,n...->...", share.to(tensor.device, tensor.dtype), tensor)[None]


def row_bytes(tensor: Tensor) -> int:
    """Bytes of one row of a tensor `[S, ...]`."""
    return tensor.element_size() * (tensor[:1].numel() if len(tensor) else 0)


class Values(Stack):
    """Any named tensors `[S, ...]`."""

    def __init__(self, **tensors: Tensor) -> None:
        self._tensors = tensors

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    def like(self, tensors: dict[str, Tensor]) -> Values:
        return Values(**tensors)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]


class AdapterTable(Stack):
    """S adapters of all projections of a model, each with a rank of its own.

    Projections of one shape lie in one tensor; a model has as many shapes as it has banks. Rows of A and columns of B
    beyond an adapter's rank are zero. A table that travels may lack one of the factors, or some projections.

    Args:
        A: for every shape of projection, `[S, P, r, in]`; empty where the table lacks A.
        B: likewise `[S, P, out, r]`.
        rank: int64 `[S]` on the CPU; r for all by default.
        has: for every shape, bool `[S, P]` on the CPU, the projections that each adapter has; what the others hold does
            not count. Empty where all have all.
        scale: fp32 `[S]` on the CPU, what each adapter is multiplied by where clients train and predict with it, beside
            its tier's scale; 1 for all where it is None. It is not in A and B.

    Raises:
        InvalidValueError: if the shapes do not belong together, or a rank exceeds r.
    """

    def __init__(
        self,
        A: Sequence[Tensor],
        B: Sequence[Tensor],
        rank: Tensor | None = None,
        has: Sequence[Tensor] = (),
        scale: Tensor | None = None,
    ) -> None:
        self.A, self.B, self.has, self.scale = tuple(A), tuple(B), tuple(has), scale
        if not self.A and not self.B:
            raise InvalidValueError("a table of adapters needs A or B, got neither")
        slots, widest = len((self.A or self.B)[0]), self.r
        for name, factor, at in (("A", self.A, -2), ("B", self.B, -1)):
            for tensor in factor:
                if tensor.dim() != 4 or len(tensor) != slots or tensor.shape[at] != widest:
                    expected = f"[{slots}, P, {widest}, in]" if name == "A" else f"[{slots}, P, out, {widest}]"
                    raise InvalidValueError(f"{name} {tuple(tensor.shape)} does not fit: expected {expected}")
        if self.A and self.B and [a.shape[1] for a in self.A] != [b.shape[1] for b in self.B]:
            raise InvalidValueError("A and B are of different projections: give both for the same ones")
        self.rank = torch.full((slots,), widest) if rank is None else rank
        if self.rank.shape != (slots,) or (slots and int(self.rank.max()) > widest):
            raise InvalidValueError(f"rank {self.rank.tolist()} does not fit: expected {slots} of at most {widest}")
        if scale is not None and (scale.shape != (slots,) or scale.dtype != torch.float32):
            raise InvalidValueError(f"scale {scale.dtype} {tuple(scale.shape)} does not fit: expected fp32 [{slots}]")
        expected_has = [factor.shape[:2] for factor in self.A or self.B] if self.has else []
        if [one.shape for one in self.has] != expected_has:
            found = [list(one.shape) for one in self.has]
            raise InvalidValueError(f"has {found} does not fit: expected {[list(one) for one in expected_has]}")

    @property
    def r(self) -> int:
        """The rank that there is room for."""
        return self.A[0].shape[-2] if self.A else self.B[0].shape[-1]

    @property
    def factors(self) -> list[tuple[Tensor, Tensor]]:
        """A `[S, P, r, in]` and B `[S, P, out, r]` for every shape of projection."""
        return list(zip(self.A, self.B, strict=True))

    def tensors(self) -> dict[str, Tensor]:
        named = {f"{index}.lora_A": tensor for index, tensor in enumerate(self.A)}
        named |= {f"{index}.lora_B": tensor for index, tensor in enumerate(self.B)}
        named |= {f"{index}.has": tensor for index, tensor in enumerate(self.has)} | {"rank": self.rank}
        return named if self.scale is None else named | {"scale": self.scale}

    def like(self, tensors: dict[str, Tensor]) -> AdapterTable:
        return AdapterTable.of(tensors)

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> AdapterTable:
        """The table whose `tensors()` these are."""
        ends = ("lora_A", "lora_B", "has")
        A, B, has = ([tensor for name, tensor in tensors.items() if name.endswith(end)] for end in ends)
        return AdapterTable(A, B, tensors["rank"], has, tensors.get("scale"))

    def with_factors(self, A: Sequence[Tensor], B: Sequence[Tensor]) -> AdapterTable:
        """The same ranks, projections and scales with other factors."""
        return AdapterTable(A, B, self.rank, self.has, self.scale)

    def resized(self, r: int) -> AdapterTable:
        """The same adapters with room for another rank: filled up with zeros, or without what is beyond it.

        Raises:
            InvalidValueError: if an adapter's rank exceeds r.
        """
        if len(self) and int(self.rank.max()) > r:
            raise InvalidValueError(f"adapters of rank {int(self.rank.max())} have no room in rank {r}")
        more = max(r - self.r, 0)
        A = [F.pad(tensor[:, :, :r], (0, 0, 0, more)) for tensor in self.A]
        B = [F.pad(tensor[..., :r], (0, more)) for tensor in self.B]
        return self.with_factors(A, B)

    def first(self, r: int | None) -> AdapterTable:
        """The first r ranks of each adapter, with room for no more; None: all."""
        if r is None or r >= self.r:
            return self
        return self.leading(torch.full((len(self),), r)).resized(r)

    def leading(self, rank: Tensor) -> AdapterTable:
        """The first ranks of each adapter, `rank` `[S]` of them at most; zeros beyond."""
        rank = torch.minimum(self.rank, rank)
        used = torch.arange(self.r) < rank[:, None]  # [S, r]
        A = [tensor.where(used[:, None, :, None].to(tensor.device), 0) for tensor in self.A]
        B = [tensor.where(used[:, None, None, :].to(tensor.device), 0) for tensor in self.B]
        return AdapterTable(A, B, rank, self.has, self.scale)

    def having(self, has: Sequence[Tensor]) -> AdapterTable:
        """The same adapters of some projections, `has` bool `[S, P]` for every shape; zeros for the others."""
        A = [tensor.where(one[..., None, None].to(tensor.device), 0) for tensor, one in zip(self.A, has, strict=False)]
        B = [tensor.where(one[..., None, None].to(tensor.device), 0) for tensor, one in zip(self.B, has, strict=False)]
        return AdapterTable(A, B, self.rank, has, self.scale)

    def only(self, factors: str) -> AdapterTable:
        """The table without one of its factors: what is left is "A" or "B"."""
        return self.with_factors(self.A if "A" in factors else (), self.B if "B" in factors else ())

    def scaled(self, scale: Tensor | None) -> AdapterTable:
        """The same adapters with other scales, fp32 `[S]`; None: of 1."""
        return AdapterTable(self.A, self.B, self.rank, self.has, scale)

    def with_scale_in_B(self) -> AdapterTable:
        """The same adapters, with scales of 1.

        Raises:
            InvalidValueError: if there are scales and no B.
        """
        if self.scale is None:
            return self
        if not self.B:
            raise InvalidValueError("adapters with scales need their B here, which the table lacks")
        scale = self.scale[:, None, None, None]
        B = [(tensor * scale.to(tensor.device)).to(tensor.dtype) for tensor in self.B]
        return AdapterTable(self.A, B, self.rank, self.has)

    def put(self, index: Tensor, rows: AdapterTable) -> None:
        if self.scale is None and rows.scale is not None:
            raise InvalidValueError("a table without scales has no place for those of other rows: give it scales of 1")
        super().put(index, rows.with_scale_as(self))

    def where(self, mask: Tensor, other: AdapterTable) -> AdapterTable:
        return super(AdapterTable, self.with_scale_as(other)).where(mask, other.with_scale_as(self))

    def with_scale_as(self, other: AdapterTable) -> AdapterTable:
        """The same adapters, with scales if another table has some."""
        known = self.scale is not None or other.scale is None
        return self if known else self.scaled(torch.ones(len(self), dtype=torch.float32))

    def joined(self, other: AdapterTable) -> AdapterTable:
        """This table with the factors of another one in the place of its own."""
        return other.with_factors(other.A or self.A, other.B or self.B)

    def each(self, change: Callable[[Tensor], Tensor]) -> AdapterTable:
        return self.with_factors([change(a) for a in self.A], [change(b) for b in self.B])

    def mean(self, weights: Tensor) -> AdapterTable:
        rows = self.with_scale_in_B()
        A, B = ([weighted_mean(tensor, weights) for tensor in factor] for factor in (rows.A, rows.B))
        return AdapterTable(A, B, self.rank.max()[None])

    def finite(self) -> Tensor:
        found = torch.stack([tensor.isfinite().flatten(1).all(1) for tensor in (*self.A, *self.B)]).all(0)
        return found if self.scale is None else found & self.scale.isfinite().to(found.device)

    def nbytes(self) -> Tensor:
        """Bytes of each adapter: of the ranks and projections that it has, not of those that there is room for. To say
        which these are, and their scales, counts for nothing."""
        total = torch.zeros(len(self), dtype=torch.long)
        for factor in (self.A, self.B):
            for index, tensor in enumerate(factor):
                each = row_bytes(tensor[:, 0]) if tensor.shape[1] else 0  # of one projection
                total += each * (self.has[index].sum(1) if self.has else tensor.shape[1])
        return self.rank * (total // max(self.r, 1))
