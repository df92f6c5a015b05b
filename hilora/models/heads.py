"""Where a model's classifier is, and what it takes, also where the ViT lies inside of another module."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from hilora.errors import InvalidValueError
from hilora.models.registry import Family, family_of
from hilora.models.wrappers import plain_path, unwrapped

OF_A_CLASSIFIER = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d)  # layers with parameters that one consists of


def find_heads(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The modules that are trained whole beside the adapters.

    Args:
        model: any module.
        names: ends of their paths; None looks for the classifier: the model's own, that of the ViTs inside of it, or
            else the linear layers that a module has beside a ViT, as in `Sequential(vit, Linear)`.

    Raises:
        ValueError: if a name finds nothing.
    """
    model = unwrapped(model)
    if names is not None:
        return [module for name in names for module in _named(model, name)]
    found = _own(model)
    if not found and type(family_of(model)) is Family:
        for path, vit in inner_vits(model):
            found += _own(vit) or _beside(model, path)
    return list(dict.fromkeys(found))


def says_its_head(model: nn.Module) -> bool:
    """Whether a model without a classifier is known to be one: a ViT of a library, and nothing around it."""
    return type(family_of(unwrapped(model))) is not Family


def _own(model: nn.Module) -> list[nn.Module]:
    heads = family_of(model).heads(model)
    return [head for head in heads if next(head.parameters(), None) is not None]


def _named(model: nn.Module, name: str) -> list[nn.Module]:
    paths = {path: module for path, module in model.named_modules() if path}
    found = {module for path, module in paths.items() if f".{plain_path(path, model)}".endswith(f".{name}")}
    if not found:
        children = ", ".join(name for name, _ in model.named_children())
        raise InvalidValueError(f"modules_to_save names {name!r}, which the model does not have; it has {children}")
    return list(found)


def example_image(model: nn.Module) -> Tensor | None:
    """What a model takes as far as that is known: an image for it, or for the one ViT inside of it."""
    if type(family_of(model)) is not Family:
        return family_of(model).example(model)
    inner = [vit for _, vit in inner_vits(model)]
    return family_of(inner[0]).example(inner[0]) if len(inner) == 1 else None


def inner_vits(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules inside of one that are models of a library, with their paths."""
    for name, child in module.named_children():
        inner, at = unwrapped(child), f"{path}.{name}" if path else name
        if type(family_of(inner)) is not Family:
            yield at, inner
        else:
            yield from inner_vits(child, at)


def _beside(model: nn.Module, path: str) -> list[nn.Module]:
    """The classifiers in the nearest module around a ViT that has one."""
    while path:
        path, _, name = path.rpartition(".")
        around = model.get_submodule(path)
        found = [child for other, child in around.named_children() if other != name and _is_classifier(child)]
        if found:
            return found
    return []


def _is_classifier(module: nn.Module) -> bool:
    layers = [layer for layer in module.modules() if next(layer.parameters(recurse=False), None) is not None]
    return any(isinstance(layer, nn.Linear) for layer in layers) and all(
        isinstance(layer, OF_A_CLASSIFIER) for layer in layers
    )
