"""The models of timm."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hilora.errors import FileError, HiLoRAError, InvalidValueError, MissingFileError
from hilora.models.backbone import Backbone
from hilora.models.registry import Family, pair


class FetchError(HiLoRAError, RuntimeError):
    """Weights that cannot be fetched."""


class Timm(Family):
    name = "timm"
    aliases: ClassVar[Mapping[str, Sequence[str]]] = {
        "q": ("wq", "q.linear", "q.ln.linear", "q.conv", "q.proj.conv"),  # CrossViT, LeViT, EfficientFormer V2
        "k": ("wk", "k.conv"),
        "v": ("wv", "v.conv"),
        "qkv": ("qkv.linear", "qkv.conv", "qkvs.*.conv", "qkv_proj"),  # LeViT, EfficientViT of MIT, MSRA, MobileViT V2
        "proj": ("attn_out_proj", "proj.ln.linear", "proj.conv", "proj.1.conv"),  # parallel blocks, LeViT, EfficientViT
        "fc1": ("fc1_g", "fc1_x", "mlp.w12", "mlp.ln1.linear"),  # SwiGLU, that of DINOv2, LeViT
        "fc2": ("mlp_out_proj", "mlp.w3", "mlp.ln2.linear"),
    }

    def owns(self, model: nn.Module) -> bool:
        return hasattr(model, "get_classifier")

    def title(self, model: nn.Module) -> str:
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        names = [cfg.get("architecture"), cfg.get("tag")]
        return ".".join(name for name in names if name) or super().title(model)

    def heads(self, model: nn.Module) -> list[nn.Module]:
        found: Any = model.get_classifier()  # type: ignore[operator]
        heads = found if isinstance(found, tuple) else (found,)
        return [head for head in heads if isinstance(head, nn.Module)]

    def image_size(self, model: nn.Module) -> tuple[int, int] | None:
        own = getattr(getattr(model, "patch_embed", None), "img_size", None)
        cfg: Any = getattr(model, "default_cfg", None) or {}
        return pair(own or cfg.get("input_size"))

    def knows(self, name: str) -> bool:
        import timm

        return bool(timm.is_model(name.split(".")[0]))

    def load(self, name: str, weights: Path | None, size: int | None) -> Backbone:
        import timm

        if weights is not None and not weights.is_file():
            raise MissingFileError(f"there is no file of weights at {weights}")
        extra = {} if size is None else {"img_size": size}
        fresh = _fresh(name, extra)  # whatever is wrong with the name or the size is not the weights
        overlay = {}
        if weights is not None:
            overlay = {"pretrained_cfg_overlay": {"state_dict": _with_classifier(_read_weights(weights), fresh)}}
        try:
            # With its own classifier, since timm would otherwise load whatever fits and leave the rest random.
            model = timm.create_model(name, pretrained=True, **extra, **overlay)
        except Exception as error:  # hub clients raise errors of many kinds
            if weights is not None:
                raise InvalidValueError(f"the weights in {weights} do not fit {name}: {error}") from error
            raise FetchError(
                f"the weights of {name} cannot be fetched ({type(error).__name__}): give a local file by --weights"
            ) from error
        model.reset_classifier(0)
        return described(model, name if weights is None else f"{name} ({weights.name})")


def described(model: Any, name: str) -> Backbone:
    """A model of timm without a classifier, with what it expects."""
    from timm.data import resolve_model_data_config

    expected = resolve_model_data_config(model)
    size = Timm().image_size(model) or pair(expected["input_size"])
    assert size is not None
    mean, std = (torch.tensor(expected[of]) for of in ("mean", "std"))
    return Backbone(model, name, size[0], mean, std, model.num_features)


def _fresh(name: str, extra: Mapping[str, Any]) -> Any:
    """A model with random weights.

    Raises:
        InvalidValueError: it has no size of images to choose.
    """
    import timm

    try:
        return timm.create_model(name, **extra)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        raise InvalidValueError(f"{name} takes images of any size and no img_size: leave it out") from error


def _with_classifier(weights: dict[str, Tensor], fresh: Any) -> dict[str, Tensor]:
    """Weights with a classifier, random where a file has none: it is taken off in any case."""
    heads = [f"{path}." for path, module in fresh.named_modules() if module in Timm().heads(fresh)]
    own = {key: value for key, value in fresh.state_dict().items() if key.startswith(tuple(heads))}
    return weights if own.keys() & weights.keys() else {**weights, **own}


def _read_weights(path: Path) -> dict[str, Tensor]:
    """A state dict, read without running anything that the file might say."""
    from timm.models import load_state_dict

    try:
        return dict(load_state_dict(str(path), use_ema=False, weights_only=True))
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        said = str(error)
        if "weights_only" in said:  # torch's advice is to read the file as code
            named = re.search(r"(?:globals?:|GLOBAL) ([\w.]+)", said)
            said = f"the file names {named[1] if named else 'code'}, which is refused; save its tensors alone"
        raise FileError(f"the weights in {path} cannot be read: {said}") from error
