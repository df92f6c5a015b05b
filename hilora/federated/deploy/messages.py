"""The messages of a deployment, as bytes: one safetensors file each, whose header names the kind and what it is about.

Nothing that was received is run or trusted: a message has the fields of its kind, of their types, and no others.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError
from torch import Tensor

from hilora.errors import FileError, HiLoRAError
from hilora.federated.archive import packed, unpacked
from hilora.federated.protocol import Stage

Count = Annotated[int, Field(ge=0, lt=2**53)]
Pair = Annotated[tuple[Count, Count], Strict(False)]  # a list in JSON
Tensors = dict[str, Tensor]
RUN = r"^[0-9a-f]{16}$"  # a client names a file after it


class MessageError(HiLoRAError, ValueError):
    """A message that is damaged, or not what was expected."""


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


class Errand(_Fields):
    """What clients are asked to do.

    Attributes:
        run: tells one training from another, over all restarts of its server.
        purpose: what random streams are for: "training" in rounds, "probe" between them, "models" to predict with, and
            "unseen" where an unseen client trains by itself, to predict.
        number: of the round in the run, from 1; 0 outside of rounds.
        stage: with the tier and the task; `round` is the number in it.
    """

    run: Annotated[str, Field(pattern=RUN)]
    purpose: str
    number: Count
    stage: Stage
    round: Count

    def __str__(self) -> str:
        return f"{self.purpose}, round {self.number} (stage {self.stage.tier}, its round {self.round})"


class Hello(_Fields):
    """The server asks a node who it is."""

    kind: Literal["hello"] = "hello"


class Present(_Fields):
    """A node says which client it is, whether it takes part in the training or comes after it, how many training images
    it has unless that is a secret, and the checksum of its backbone."""

    kind: Literal["present"] = "present"
    client: Count
    seen: bool
    images: Count | None
    backbone: str


class Order(_Fields):
    """A download for one client.

    Attributes:
        tiers: for each tier, the digests of its factors, one for each row; 0 where the client has none.
        head: the digests of the heads likewise.
        choices: tiers, and "head", of which the client gets several to choose from.
        parts: the tensors of parts that the client does not hold.
        blocks: bool `[L]`, the blocks whose adapters it trains; None: all.
    """

    kind: Literal["order"] = "order"
    errand: Errand
    tiers: dict[str, dict[Literal["A", "B"], list[int]]]
    head: list[int] | None
    choices: list[str]
    parts: dict[str, Tensors]
    blocks: Tensor | None


class Lacks(_Fields):
    """A client does not hold these parts (any more): they are to be sent."""

    kind: Literal["lacks"] = "lacks"
    errand: Errand
    parts: list[str]


class Done(_Fields):
    """An upload of one client; where its number of images is a secret, `images` is 1."""

    kind: Literal["done"] = "done"
    errand: Errand
    client: Count
    images: Count
    tiers: dict[str, Tensors]
    head: Tensors | None
    choice: Count | None
    scores: Tensor | None


class Counts(_Fields):
    """How many images of each split a client predicts right, and of how many; of a hundred, where its number of images
    is a secret."""

    kind: Literal["counts"] = "counts"
    errand: Errand
    client: Count
    val: Pair
    test: Pair


class Refused(_Fields):
    """A client cannot do what it was asked to do."""

    kind: Literal["refused"] = "refused"
    reason: Annotated[str, Field(max_length=2000)]


Message = Hello | Present | Order | Lacks | Done | Counts | Refused


def to_bytes(message: Message) -> bytes:
    """A message as the bytes of a safetensors file."""
    return packed(message.model_dump())


def of_bytes(data: bytes, *kinds: type[Any]) -> Any:
    """The message in bytes, of one of the kinds that can come here.

    Raises:
        MessageError: it is damaged, of another kind, or has other fields than its kind; says what was expected.
    """
    try:
        tree = unpacked(data)
    except FileError as error:
        raise MessageError(str(error)) from error
    named = {kind.model_fields["kind"].default: kind for kind in kinds}
    found = tree.get("kind")
    if not isinstance(found, str) or found not in named:
        raise MessageError(f"a message is {found!r:.60}, expected {' or '.join(named)}")
    try:
        return named[found].model_validate(tree)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors()[:5])
        raise MessageError(f"a message of kind {found} does not fit: {said}") from error
