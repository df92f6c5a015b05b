"""What is adapted, and how: the configuration of the adapters."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from numbers import Real
from typing import Any, ClassVar

from torch import nn

from hilora.errors import InvalidValueError


@dataclass(frozen=True)
class HiLoRAConfig:
    """Adapters of a model.

    Attributes:
        r: rank; one for all tiers, or one for each, `{"root": 16, "cluster": 8, "leaf": 4}`.
        lora_alpha: a tier's product is scaled by `lora_alpha / r`; one for all tiers, or one for each.
        target_modules: which linear layers and 1 × 1 convolutions to adapt. `"q"`, `"k"`, `"v"` mean a separate layer
            or their part of a fused `qkv`, `kv` or `qk`; `"proj"`, `"fc1"`, `"fc2"` the other layers of a block,
            whatever the library calls them; anything else is the end of a module's path (`"mlp.fc1"`) or a pattern for
            it (`"[0-5].*.fc1"`). A string in place of a tuple: `"all-linear"` for all linear layers but the
            classifier's, else a regular expression that the whole of a path must match, as in PEFT.
        lora_dropout: probability of dropping an input of the adapters, in training mode only.
        tiers: names of the tiers in the order of the cascade.
        slots: adapters in each tier's table; one number for all tiers, or one for each. Tables also grow on demand
            (`hilora.set_slots`).
        modules_to_save: ends of the paths of the modules that are trained whole beside every tier, and saved: the
            classifier, `("head",)`; None finds it, `()` is none.
        layers_to_transform: adapt only the targets in these blocks, by the first number in their paths; None: all.
        base_dtype: `"float8_e4m3fn"` keeps the frozen weights of adapted layers in 8 bits, with a scale for each row;
            None: as they are.

    Raises:
        ValueError: if a value is out of range, or a tier is not named.
    """

    r: int | Mapping[str, int] = 8
    lora_alpha: float | Mapping[str, float] = 16
    target_modules: tuple[str, ...] | str = ("q", "v")
    lora_dropout: float = 0.0
    tiers: tuple[str, ...] = ("root", "cluster", "leaf")
    slots: int | Mapping[str, int] = 1
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    base_dtype: str | None = None

    _scales: ClassVar[dict[str, float]]  # of an instance; no field

    def __post_init__(self) -> None:
        if self.modules_to_save is not None:
            names = self.modules_to_save
            if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
                raise InvalidValueError(f"modules_to_save must be a tuple of names or None, got {names!r}")
            object.__setattr__(self, "modules_to_save", tuple(names))
        if self.layers_to_transform is not None:
            blocks = self.layers_to_transform
            if not isinstance(blocks, list | tuple | range) or not blocks or not all(type(b) is int for b in blocks):
                raise InvalidValueError(f"layers_to_transform must be a tuple of block numbers, got {blocks!r}")
            object.__setattr__(self, "layers_to_transform", tuple(blocks))
        if self.base_dtype not in (None, "float8_e4m3fn"):
            raise InvalidValueError(f"base_dtype must be 'float8_e4m3fn' or None, got {self.base_dtype!r}")
        if isinstance(self.target_modules, str):
            _check_expression(self.target_modules)
        for field in ("target_modules", "tiers"):
            names = getattr(self, field)
            if field == "target_modules" and isinstance(names, str):
                continue
            if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
                raise InvalidValueError(f"{field} must be a tuple of names, at least one, got {names!r}")
            object.__setattr__(self, field, tuple(names))
        if len(set(self.tiers)) < len(self.tiers):
            raise InvalidValueError(f"tiers must be distinct names, got {self.tiers}")
        for name in self.tiers:
            if not name.isidentifier() or hasattr(nn.ParameterDict, name):
                raise InvalidValueError(f"a tier cannot be called {name!r}: choose a Python identifier such as 'root'")
        if not _is_number(self.lora_dropout) or not 0 <= self.lora_dropout < 1:
            raise InvalidValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout!r}")
        self._settle("r", int, "a whole number of at least 1", lambda v: v == v // 1 and v >= 1)
        self._settle("slots", int, "a whole number of at least 0", lambda v: v == v // 1 and v >= 0)
        self._settle("lora_alpha", float, "a positive number", lambda v: 0 < v < math.inf)
        object.__setattr__(self, "_scales", {tier: self.scale(tier) for tier in self.tiers})

    def _settle(self, field: str, kind: type, expected: str, fits: Callable[[Any], bool]) -> None:
        """Make plain numbers of a field's values, or raise an error."""
        value = getattr(self, field)
        if isinstance(value, Mapping) and set(value) != set(self.tiers):
            raise InvalidValueError(f"{field} names the tiers {sorted(value)}, the config has {sorted(self.tiers)}")
        for number in value.values() if isinstance(value, Mapping) else (value,):
            if not _is_number(number) or not fits(number):
                raise InvalidValueError(f"{field} must be {expected}, got {value!r}")
        plain = {tier: kind(value[tier]) for tier in self.tiers} if isinstance(value, Mapping) else kind(value)
        object.__setattr__(self, field, plain)

    def rank(self, tier: str) -> int:
        """Rank of a tier; a ValueError for a tier that there is not."""
        return int(self._of("r", tier))

    def scale(self, tier: str) -> float:
        """What a tier's product `B A` is multiplied by: `lora_alpha / r`."""
        return float(self._of("lora_alpha", tier)) / self.rank(tier)

    @property
    def scales(self) -> dict[str, float]:
        """That of each tier."""
        return self._scales

    def slot_count(self, tier: str) -> int:
        """Adapters that a tier's table starts with."""
        return int(self._of("slots", tier))

    def _of(self, field: str, tier: str) -> Any:
        if tier not in self.tiers:
            raise InvalidValueError(f"unknown tier {tier!r}: this config has {', '.join(self.tiers)}")
        value = getattr(self, field)
        return value[tier] if isinstance(value, Mapping) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved beside the adapters; without `base_dtype` where it is None, for older
        versions."""
        return {name: value for name, value in asdict(self).items() if name != "base_dtype" or value is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HiLoRAConfig:
        """The config that `to_dict` described, also after JSON; fields that are absent have their defaults.

        Raises:
            ValueError: for unknown fields, or values out of range.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise InvalidValueError(f"unknown fields {sorted(unknown)}: made by a newer hilora?")
        return cls(**values)


def _check_expression(expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise InvalidValueError(
            f"target_modules {expression!r} is no regular expression ({error}): give one, or a tuple of names"
        ) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
