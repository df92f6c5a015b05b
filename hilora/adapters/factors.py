"""A layer's adapters as parameters, and what a bank has in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.offload import check_brought
from hilora.adapters.torch_internals import in_transform, version


class Factors(nn.ParameterDict):
    """A layer's A's, or its B's: tier → parameter.

    A parameter is `[r, in]` (or `[out, r]`), with a dimension for S ≠ 1 adapters before that, and before this one for
    several projections of the layer. A forward pass reads them by a call, for tools that bring a module's parameters by
    hooks on its calls.
    """

    __call__ = nn.Module.__call__  # a ParameterDict refuses calls

    def forward(self) -> dict[str, Tensor]:
        """The parameters, by tier."""
        return {tier: parameter for tier, parameter in self._parameters.items() if parameter is not None}

    def __getitem__(self, tier: str) -> Any:
        check_brought(self, self._parameters.get(tier), "adapters")
        return super().__getitem__(tier)


def pieces(parameter: Tensor, projections: int) -> list[Tensor]:
    """A layer's parameter as one table for each of its projections: `[S, r, in]`, `[S, out, r]`."""
    tables = parameter.unbind(0) if projections > 1 else (parameter,)
    return [table if table.dim() == 3 else table.unsqueeze(0) for table in tables]


def cut(B: Tensor, width: int) -> Tensor:
    """B `[S, width, r]` of a projection: where several have several widths, it has rows for the widest."""
    return B if B.shape[1] == width else B[:, :width]


def slot_count(parameter: Tensor, projections: int) -> int:
    """S of a layer's parameter."""
    return parameter.shape[-3] if parameter.dim() - (projections > 1) == 3 else 1


def squeezed(table: Tensor) -> Tensor:
    """`[n, S, r, in]` as a layer's parameter has it: without the dimensions of one projection and of one slot."""
    table = table.squeeze(1) if table.shape[1] == 1 else table
    return table.squeeze(0) if table.shape[0] == 1 else table


def joined(parameters: Sequence[Tensor], projections: Sequence[int]) -> Tensor:
    """The parameters of a bank's layers as one new tensor, `[P, S, r, in]` or `[P, S, out, r]`, through which gradients
    go; those that FSDP has sharded are gathered.

    Args:
        parameters: one a layer.
        projections: how many projections each of the layers has.
    """
    parameters = [whole(parameter) for parameter in parameters]
    first = parameters[0]
    slots = slot_count(first, projections[0])
    return torch.cat(
        [
            parameter.reshape(count, slots, *parameter.shape[-2:]).to(first.device, first.dtype)
            for parameter, count in zip(parameters, projections, strict=True)
        ]
    )


def whole(tensor: Tensor) -> Tensor:
    """A tensor's numbers: gathered where FSDP has sharded it (then all processes must call this), and as they count
    where a library has quantised them."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.dequantize() if is_quantised(found) else found


def is_quantised(tensor: Tensor) -> bool:
    """Whether a library keeps a tensor's numbers in fewer bits, in a class of its own."""
    return type(tensor).dequantize is not Tensor.dequantize


def sharded_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A value that all processes have, as FSDP has sharded a parameter."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor  # which takes half a second

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device, parameter.dtype), parameter.device_mesh, parameter.placements)


class Held:
    """Tables of a tier that a bank uses in place of its layers' parameters: A `[P, S, r, in]`, B `[P, S, out, r]`.

    All projections of a forward pass are taken apart by one `unbind`: layer by layer, the backward pass would write a
    gradient of the whole table for each of them. A part is handed out once, so that every forward pass has an unbind
    of its own. Without a history, views serve again, until a table lies elsewhere.

    `scales`: fp32 `[S]`, what each adapter is multiplied by beside the tier's scale; None: nothing.
    """

    def __init__(self, A: Tensor, B: Tensor, scales: Tensor | None = None) -> None:
        self.A, self.B, self.scales = A, B, scales
        self._parts: dict[str, tuple[int, dict[int, Tensor]]] = {}
        self._views: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}  # by their place and both addresses

    @property
    def scaled_B(self) -> Tensor:
        """B, with the scales in it."""
        return self.B if self.scales is None else (self.B * self.scales[:, None, None]).to(self.B.dtype)

    def parts(self, first: int, widths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The adapters of projections from the `first` on: A `[S, r, in]`, B `[S, width, r]`, cut to their widths."""
        A, B = self.A, self.B
        indices = range(first, first + len(widths))
        if torch.compiler.is_compiling() or in_transform():
            return [(A[index], cut(B[index], width)) for index, width in zip(indices, widths, strict=True)]
        if torch.is_grad_enabled() and (A.requires_grad or B.requires_grad):
            return [
                (self._part("A", A, index), cut(self._part("B", B, index), width))
                for index, width in zip(indices, widths, strict=True)
            ]
        key = first, A.data_ptr(), B.data_ptr()
        if key not in self._views:
            with torch.no_grad():
                views = [(A[index], cut(B[index], width)) for index, width in zip(indices, widths, strict=True)]
            self._views = {old: kept for old, kept in self._views.items() if old[1:] == key[1:]} | {key: views}
        return self._views[key]

    def _part(self, factor: str, table: Tensor, index: int) -> Tensor:
        written, parts = self._parts.get(factor, (-1, {}))
        view = parts.pop(index, None) if written == version(table) else None  # threads never get the same one
        if view is None:
            written, parts = version(table), dict(enumerate(table.unbind(0)))
            view = parts.pop(index)
            self._parts[factor] = written, parts
        return view
