"""What is adapted, and how: the configuration of the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class HiLoRAConfig:
    """Adapters of a model.

    Attributes:
        r: rank; one for all tiers, or one for each, `{"root": 16, "cluster": 8, "leaf": 4}`.
        lora_alpha: a tier's product is scaled by `lora_alpha / r`; one for all tiers, or one for each.
        target_modules: which linear layers to adapt. `"q"`, `"k"`, `"v"` mean a separate layer or the slice of a fused
            `qkv`; `"proj"`, `"fc1"`, `"fc2"` the other layers of a block, whatever the library calls them; anything
            else is the end of a module's path (`"mlp.fc1"`) or a pattern for all of it (`"blocks.[0-5].*.fc1"`).
        lora_dropout: probability of dropping an input of the adapters, in training mode only.
        tiers: names of the tiers in the order of the cascade.
        slots: adapters in each tier's table; one number for all tiers, or one for each. Tables also grow on demand
            (`hilora.set_slots`).

    Raises:
        ValueError: if a value is out of range, or a tier is not named.
    """

    r: int | Mapping[str, int] = 8
    lora_alpha: float | Mapping[str, float] = 16
    target_modules: tuple[str, ...] = ("q", "v")
    lora_dropout: float = 0.0
    tiers: tuple[str, ...] = ("root", "cluster", "leaf")
    slots: int | Mapping[str, int] = 1

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, str) or isinstance(self.tiers, str):
            raise ValueError("target_modules and tiers are tuples of names, not one string")
        object.__setattr__(self, "target_modules", tuple(self.target_modules))
        object.__setattr__(self, "tiers", tuple(self.tiers))
        if not self.target_modules:
            raise ValueError("target_modules is empty: name at least one, such as ('q', 'v')")
        if not self.tiers or len(set(self.tiers)) < len(self.tiers):
            raise ValueError(f"tiers must be distinct names, at least one, got {self.tiers}")
        for name in self.tiers:
            if not name.isidentifier():
                raise ValueError(f"tier {name!r} must be a Python identifier: it becomes the name of an argument")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}")
        for field in ("r", "lora_alpha", "slots"):
            value = getattr(self, field)
            if isinstance(value, Mapping):
                object.__setattr__(self, field, dict(value))
                if set(value) != set(self.tiers):
                    raise ValueError(f"{field} names the tiers {sorted(value)}, the config has {sorted(self.tiers)}")
        for tier in self.tiers:
            if self.rank(tier) < 1 or self.rank(tier) != int(self.rank(tier)):
                raise ValueError(f"r of {tier} must be a whole number of at least 1, got {self.rank(tier)}")
            if self.slot_count(tier) < 0:
                raise ValueError(f"slots of {tier} must not be negative, got {self.slot_count(tier)}")
            if not 0 < float(self._of("lora_alpha", tier)) < float("inf"):
                raise ValueError(f"lora_alpha of {tier} must be positive, got {self._of('lora_alpha', tier)}")

    def rank(self, tier: str) -> int:
        """Rank of a tier."""
        return int(self._of("r", tier))

    def scale(self, tier: str) -> float:
        """What a tier's product `B A` is multiplied by: `lora_alpha / r`."""
        return float(self._of("lora_alpha", tier)) / self.rank(tier)

    def slot_count(self, tier: str) -> int:
        """Adapters that a tier's table starts with."""
        return int(self._of("slots", tier))

    def _of(self, field: str, tier: str) -> Any:
        if tier not in self.tiers:
            raise ValueError(f"unknown tier {tier!r}: this config has {', '.join(self.tiers)}")
        value = getattr(self, field)
        return value[tier] if isinstance(value, Mapping) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they are saved beside the adapters."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> HiLoRAConfig:
        """The config that `to_dict` described.

        Raises:
            ValueError: for unknown or missing fields.
        """
        known = set(cls.__dataclass_fields__)
        if set(values) - known:
            raise ValueError(f"unknown fields {sorted(set(values) - known)}: made by a newer hilora?")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
