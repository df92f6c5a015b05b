"""What decides the result of a training: what all methods share. A method's own settings stand with the method."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from hilora.errors import InvalidValueError

TIERS = ("root", "cluster", "leaf")


class Settings(BaseModel):
    """Named values with types, bounds and a line of description each, from which the command line, TOML files and the
    docs are made.

    Raises:
        InvalidValueError: naming every field that is unknown or does not fit, its value, and what was expected.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            said = "; ".join(_told(one, type(self)) for one in error.errors(include_url=False))
            raise InvalidValueError(said) from None

    def changed(self, **values: Any) -> Self:
        """The same with other values of some fields, checked likewise."""
        return type(self)(**{**dict(self), **values})

    def plain(self) -> dict[str, Any]:
        """Values as JSON has them."""
        return self.model_dump(mode="json")

    def unusual(self) -> dict[str, Any]:
        """Values as JSON has them that are not the defaults, and those of fields that have none."""
        fields = type(self).model_fields
        required = {name: getattr(self, name) for name, field in fields.items() if field.is_required()}
        usual = type(self)(**required).plain()
        return {name: value for name, value in self.plain().items() if name in required or value != usual[name]}


def _told(error: Any, kind: type[Settings]) -> str:
    """An error of pydantic in a few words."""
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no setting {name!r}: expected some of {', '.join(kind.model_fields)}"
    said = error["msg"].removeprefix("Value error, ")
    if not name:  # of several settings together
        return str(said)
    return f"{name}={error['input']!r}: {said[:1].lower() + said[1:]}"


def per_tier(value: Any) -> Any:
    """One value for all tiers, a sequence of one a tier (or a text with commas), or a mapping: as a mapping.

    Raises:
        InvalidValueError: for another number of values, or other tiers.
    """
    if isinstance(value, Mapping):
        if set(value) != set(TIERS):
            raise InvalidValueError(f"give one value, or one for each of {', '.join(TIERS)}, got {', '.join(value)}")
        return {tier: value[tier] for tier in TIERS}
    value = value.split(",") if isinstance(value, str) else value
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) not in (1, len(TIERS)):
        raise InvalidValueError(f"give one value, or one for each of {', '.join(TIERS)}, got {values}")
    return dict(zip(TIERS, values * len(TIERS) if len(values) == 1 else values, strict=True))


def number_of_bytes(text: str) -> int:
    """`1500`, `150 kB` or `1.5MB`; a kB is 1,000 bytes.

    Raises:
        ValueError: it reads otherwise.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|kB|MB|GB)?\s*", text)
    if found is None:
        raise ValueError(f"{text!r} is no number of bytes")
    return int(Fraction(found[1]) * 1000 ** ("B", "kB", "MB", "GB").index(found[2] or "B"))


def shares(text: str, number: Callable[[str], int] = int) -> list[tuple[Fraction, int]]:
    """Budgets of shares of the clients: `1/3:12,1/3:9,1/3:6` or `0.5:16,0.5:4`; `8` alone is one for all.

    Args:
        text: the shares, and the budget of each.
        number: reads a budget; it raises a ValueError for what is none.

    Raises:
        InvalidValueError: it reads otherwise, or the shares do not add up to 1.
    """
    found = []
    for part in text.split(","):
        share, colon, budget = part.rpartition(":")
        try:
            found.append((Fraction(share.strip()) if colon else Fraction(1), number(budget)))
        except (ValueError, ZeroDivisionError):
            form = "1/3:12,2/3:9" if number is int else "1/3:1.5MB,2/3:600kB (a number of B, kB, MB or GB)"
            raise InvalidValueError(f"{part!r} is no budget of a share: expected some, as in {form}") from None
    if any(share <= 0 or budget < 1 for share, budget in found):
        raise InvalidValueError(f"{text!r}: shares must be above 0, and budgets at least 1")
    if (total := sum(share for share, _ in found)) != 1:
        raise InvalidValueError(f"{text!r}: the shares add up to {total}, expected 1")
    return found


def _text(value: Any) -> Any:
    """A number as the text that it is one of."""
    return str(value) if type(value) is int else value


def _shares(text: str) -> str:
    shares(text)
    return text


def _byte_shares(text: str) -> str:
    shares(text, number_of_bytes)
    return text


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Whole = Annotated[int, BeforeValidator(_no_bool)]
Number = Annotated[float, BeforeValidator(_no_bool)]
Shares = Annotated[str, BeforeValidator(_text), AfterValidator(_shares)]
ByteShares = Annotated[str, BeforeValidator(_text), AfterValidator(_byte_shares)]
Rounds = Annotated[dict[str, Annotated[Whole, Field(ge=0)]], BeforeValidator(per_tier)]
Ranks = Annotated[dict[str, Annotated[Whole, Field(ge=1)]], BeforeValidator(per_tier)]
Rates = Annotated[dict[str, Annotated[Number, Field(ge=0)]], BeforeValidator(per_tier)]


class TrainingSettings(Settings):
    """A federated training, whatever the method. What is "per tier" is one value, or one for each of root, cluster and
    leaf."""

    rounds: Rounds = Field(
        [15, 20, 15],
        validate_default=True,
        description="rounds, per tier; a method of one tier trains it for all of them",
    )
    lr: Rates = Field(
        [3e-3, 3e-3, 3e-4], validate_default=True, description="learning rate of AdamW for the adapters, per tier"
    )
    head_lr: Rates = Field(
        [1e-2, 1e-2, 1e-3],
        validate_default=True,
        description="learning rate of AdamW for the classifier head, per tier",
    )
    rank: Ranks = Field(8, validate_default=True, description="rank of the adapters, per tier")
    lora_alpha: Rates = Field(16, validate_default=True, description="a tier is scaled by lora_alpha / rank, per tier")
    target_modules: tuple[str, ...] = Field(
        ("q", "v"), min_length=1, description="which layers are adapted, as in HiLoRAConfig"
    )
    lora_dropout: Number = Field(0.0, ge=0, lt=1, description="probability of dropping an input of the adapters")
    local_epochs: Whole = Field(1, ge=1, description="passes over a client's images in a round")
    batch_size: Whole = Field(16, ge=1, description="images of one client in a step")
    weight_decay: Number = Field(0.0, ge=0, description="of AdamW")
    participation: Number = Field(
        1.0, gt=0, le=1, description="share of the seen clients that train in a round, where something is sent"
    )
    unseen_epochs: Whole = Field(
        5, ge=0, description="local epochs of an unseen client's own adapter; 0: none is trained"
    )
    evaluate_every: Whole = Field(
        1, ge=0, description="rounds from one evaluation to the next; 0: at the end of a stage alone"
    )
    augment: bool = Field(False, description="random crops, and flips where a mirrored image keeps its label")
    seed: Whole = Field(0, ge=0, description="of everything random in the training")
    clip_norm: Number | None = Field(
        None, gt=0, description="the norm that a client's gradient is scaled down to where it is larger; none: never"
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="of the learning rates over a client's steps in a round; linear and cosine fall to zero"
    )
    rank_budgets: Shares | None = Field(
        None,
        description="the most ranks that clients hold of an adapter, for shares of them, as in 1/3:16,1/3:8,1/3:4; "
        "none: all have those of rank",
    )
    layer_budgets: Shares | None = Field(
        None,
        description="the most blocks whose adapters clients train, for shares of them, as in 1/3:12,1/3:9,1/3:6; "
        "none: all blocks",
    )
    byte_budgets: ByteShares | None = Field(
        None,
        description="the most bytes of adapters that clients send in a round, for shares of them, as in "
        "1/3:600kB,1/3:300kB,1/3:150kB: as many ranks or blocks as fit, whichever the method has budgets of; none: any",
    )
    budgets_follow: Literal["chance", "images", "groups"] = Field(
        "chance",
        description="who has the first budgets: anybody, clients with the most images, or the first true groups",
    )
    robust: Literal["none", "clip", "trimmed", "median"] = Field(
        "none",
        description="how the server takes means: by images; of clipped changes; trimmed by coordinate; the geometric "
        "median. All but the first count every client alike",
    )
    robust_trim: Number = Field(
        0.2, ge=0, lt=0.5, description="share of the clients that trimmed leaves out at either end of each coordinate"
    )
    robust_bound: Number | None = Field(
        None, gt=0, description="the norm that clip scales a client's change down to; none: the median of the norms"
    )
    update_bound: Number | None = Field(
        None, gt=0, description="the norm of a client's change beyond which its message is left out; none: any"
    )
    dp_clip: Number | None = Field(
        None,
        gt=0,
        description="differential privacy of clients: the norm that all that one changed is clipped to; none: without",
    )
    dp_noise: Number = Field(
        1.0, gt=0, description="standard deviation of the noise on the sum of clients' changes, in units of dp_clip"
    )
    dp_delta: Number = Field(1e-5, gt=0, lt=1, description="the δ at which ε is told")
    clients_at_once: Whole | None = Field(
        None,
        ge=1,
        description="clients in one forward pass, at most; none: as many as fit. Changes results by rounding alone",
    )
