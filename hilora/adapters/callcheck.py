"""Whether a model really calls the layers that were adapted, and whether clients can share a batch there.

Some ViTs of timm (BEiT, EVA-02, Swin-V2, those with rotary embeddings) compute with `self.qkv.weight` and never call
`self.qkv`: there adapters are in the weight. In a layer that is neither called nor read they would be silently without
effect. And where a layer's first dimension is not the batch, as in
models that put the sequence first, groups of rows are no clients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hilora.adapters.by_weight import AdaptedWeightLinear, end_watch, was_read, watch_reading
from hilora.adapters.layers import TieredLoRALinear
from hilora.adapters.torch_internals import hooks, is_compiled, remove_hook, walk
from hilora.errors import HiLoRAError, InvalidValueError

CALLED = "_hilora_called"  # attribute of a layer


class UncalledLayerError(InvalidValueError):
    """Adapters were put where the model never looks.

    Attributes:
        paths: of the layers that it never calls.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self.paths = tuple(paths)
        super().__init__(
            f"the model never calls {len(paths)} of the adapted layers ({', '.join(paths[:3])}…), nor reads their "
            "weights: adapters would have no effect. Choose other target_modules, such as 'proj', 'fc1', 'fc2'"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.paths,)


class MixedRowsError(InvalidValueError):
    """Several clients in one batch, where a layer's first dimension is not the batch."""


def check_calls(model: nn.Module, layers: Mapping[str, TieredLoRALinear], example: Tensor | None, given: bool) -> None:
    """Run the model and see that it calls each of `layers`, or reads its weight, and what their first dimension is;
    where it is not known what the model takes, watch its first forward pass instead.

    Args:
        model: with adapters that have no effect yet.
        layers: the adapted ones, by path.
        example: an input, its first dimension the batch; None if it is not known.
        given: by the user, so that an error of the model with it is the user's.

    Raises:
        UncalledLayerError: if a layer is neither called nor read; now, or from that first forward pass.
        ValueError: if one is only read, but its adapters have dropout.
    """
    for layer in layers.values():
        watch_reading(layer)
        layer.register_forward_pre_hook(_called)
    model.register_forward_hook(_finished, with_kwargs=True)
    if example is None:
        return
    try:
        with _quiet(model):
            model(example)
    except BaseException as error:
        if given or isinstance(error, HiLoRAError) or not isinstance(error, Exception):
            end_check(model)
            raise
        return
    _tell_rows(model, lambda example: model(example), [example])


def _called(layer: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():  # a compiled pass has no place for what a check remembers: the next other one has
        return
    layer.__dict__[CALLED] = True


def _finished(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    remove_hook(model, _finished)
    if _unseen(model) and any(map(is_compiled, model.modules())):
        with _quiet(model):  # and not compiled
            model(*args, **kwargs)
    unseen = _unseen(model)
    uncalled = [path for path, layer in unseen if not was_read(layer)]
    read = {layer: path for path, layer in unseen if was_read(layer)}
    end_check(model, read)
    if uncalled:
        raise UncalledLayerError(uncalled)
    with_dropout = [path for layer, path in read.items() if layer.config.lora_dropout]
    if with_dropout:
        raise InvalidValueError(
            f"the model uses {with_dropout[0]} by its weight, so that nothing of its input can be dropped: choose "
            "lora_dropout=0"
        )


def _unseen(model: nn.Module) -> list[tuple[str, TieredLoRALinear]]:
    """The layers, with their paths, that were not called since they are watched."""
    return [(path, layer) for path, layer in walk(model, TieredLoRALinear) if _waits(layer) and not _was_called(layer)]


def _waits(layer: nn.Module) -> bool:
    return _called in hooks(layer)


def _was_called(layer: nn.Module) -> bool:
    return CALLED in layer.__dict__


def end_check(model: nn.Module, read: Collection[TieredLoRALinear] = ()) -> None:
    """Take the hooks of a check out that waits for the model's first forward pass; of the layers that it watched, only
    `read` keep the adapters in their weight."""
    for hook in (_finished, check_rows):
        remove_hook(model, hook)
    for _, layer in walk(model, TieredLoRALinear):
        if _waits(layer):
            end_watch(layer, keep=layer in read)
        remove_hook(layer, _called)
        layer.__dict__.pop(CALLED, None)


def watch_rows(model: nn.Module) -> None:
    """Let several clients share a batch: see, now or in the next forward pass, that each layer's first dimension is the
    batch.

    Raises:
        MixedRowsError: if it is known that one's is not; also from that forward pass.
    """
    _refuse(model)
    if any(layer.rows_are_the_batch is None for layer in _layers(model)) and not isinstance(model, TieredLoRALinear):
        remove_hook(model, check_rows)
        model.register_forward_pre_hook(check_rows, with_kwargs=True)


def check_rows(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A hook before a forward pass that holds several clients."""
    layers = _layers(model)
    clients = any(slot is not None and len(slot) > 1 for layer in layers for slot in layer.shared.slots.values())
    if torch.compiler.is_compiling() or not clients:
        return
    remove_hook(model, check_rows)
    if any(layer.rows_are_the_batch is None for layer in layers):
        named = [*enumerate(args), *kwargs.items()]
        tensors = [value for _, value in named if isinstance(value, Tensor) and value.dim()]

        def call(*values: Tensor) -> None:
            left = iter(values)
            filled = {k: next(left) if isinstance(v, Tensor) and v.dim() else v for k, v in named}
            model(*[filled[i] for i in range(len(args))], **{k: filled[k] for k in kwargs})

        _tell_rows(model, call, tensors)
    try:
        _refuse(model)
    except MixedRowsError:
        model.register_forward_pre_hook(check_rows, with_kwargs=True)
        raise


def _refuse(model: nn.Module) -> None:
    for path, layer in walk(model, TieredLoRALinear):
        if isinstance(layer, AdaptedWeightLinear) and not _waits(layer):
            raise MixedRowsError(
                f"several clients cannot share a batch: the model uses {path} by its weight, which is one for all "
                "rows. Take one client at a time: hilora.set_slots with tensors of one slot"
            )
        if layer.rows_are_the_batch is False:
            raise MixedRowsError(
                f"several clients cannot share a batch: the first dimension of what {path} sees is not the batch, as "
                "where a model puts the sequence first or looks across images. Use a model with batch_first=True, or "
                "one client at a time: hilora.set_slots with tensors of one slot"
            )


def _layers(model: nn.Module) -> list[TieredLoRALinear]:
    return [layer for _, layer in walk(model, TieredLoRALinear)]


def _tell_rows(model: nn.Module, call: Callable[..., object], tensors: Sequence[Tensor]) -> None:
    """Find out for each adapted layer whether the first half of its rows is of the first of two examples: then it does
    not change with the second one. Nothing is found out if the model does not take two examples."""
    count = len(tensors[0]) if tensors else 0
    if not count or any(tensor.is_meta for tensor in tensors):
        return
    first = [tensor[:1].repeat(2, *[1] * (tensor.dim() - 1)) if len(tensor) == count else tensor for tensor in tensors]
    second = [_with_another(tensor) if len(was) == count else was for tensor, was in zip(first, tensors, strict=True)]
    try:
        with _quiet(model):
            (seen, changed) = (_inputs(model, call, values) for values in (first, second))
    except Exception:  # whatever a foreign model raises: it stays unknown
        return
    for layer, calls in seen.items():
        others = changed.get(layer, [])
        layer.rows_are_the_batch = len(calls) == len(others) and all(map(_same_first_half, calls, others))


def _with_another(pair: Tensor) -> Tensor:
    """Two examples, of which the second is another one."""
    other = pair.clone()
    noise = torch.rand(pair[1].shape, generator=torch.Generator().manual_seed(0)).to(pair.device)
    other[1] = (
        pair[1] + noise.to(pair.dtype) if pair.is_floating_point() else pair[1].flatten().flip(0).view_as(pair[1])
    )
    return other


def _inputs(
    model: nn.Module, call: Callable[..., object], values: Sequence[Tensor]
) -> dict[TieredLoRALinear, list[Tensor]]:
    """What each layer sees in a forward pass."""
    seen: dict[TieredLoRALinear, list[Tensor]] = {}

    def remember(layer: Any, args: tuple[Tensor, ...]) -> None:
        seen.setdefault(layer, []).extend(args[:1])

    handles = [layer.register_forward_pre_hook(remember) for layer in _layers(model)]
    try:
        call(*values)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _same_first_half(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dim() < 2 or len(one) % 2:
        return False
    half = len(one) // 2
    return torch.allclose(one[:half], other[:half], rtol=1e-2, atol=1e-3, equal_nan=True)


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """In eval mode, without gradients, adapters and compilation; then as it was."""
    modes = {module: module.training for module in model.modules()}
    layers = _layers(model)
    disabled = {layer.shared: layer.shared.disabled for layer in layers}
    try:
        for module in modes:
            module.training = False
        for shared in disabled:
            shared.disabled = True
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for shared, was in disabled.items():
            shared.disabled = was
        for module, mode in modes.items():
            module.training = mode
