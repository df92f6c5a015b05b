"""What the server makes of answers: messages of the kind that was asked for, to what was asked, or why they are not."""

from __future__ import annotations

from typing import Any

import torch

from hilora.federated.deploy.messages import Counts, Done, Errand, Lacks, MessageError, Refused, of_bytes
from hilora.federated.deploy.roster import Answer


def message_of(answer: Answer, client: int) -> Any:
    """The message in an answer; one that says why there is none in the place of anything else."""
    if isinstance(answer, str):
        return Refused(reason=answer)
    try:
        found = of_bytes(answer, Done, Counts, Lacks, Refused)
    except MessageError as error:
        return Refused(reason=str(error))
    if isinstance(found, Done | Counts) and found.client != client:
        return Refused(reason=f"it answers as client {found.client}")
    return found


def checked(answer: Any, kind: type[Any], errand: Errand) -> Any:
    """An answer of a kind, to what was asked.

    Raises:
        MessageError: it is another.
    """
    if isinstance(answer, Refused):
        raise MessageError(answer.reason)
    if not isinstance(answer, kind):
        raise MessageError(f"it answers with {answer.kind!r}, expected {kind.model_fields['kind'].default!r}")
    if answer.errand != errand:
        raise MessageError(f"it answers to {answer.errand}, expected {errand}")
    return answer


def counted(counts: Counts) -> dict[str, float]:
    """Shares of right answers; NaN where there are no images.

    Raises:
        MessageError: more are right than there are.
    """
    found = {}
    for split in ("val", "test"):
        right, total = getattr(counts, split)
        if right > total:
            raise MessageError(f"{right} of {total} {split} images are right: expected at most all")
        found[split] = right / total if total else torch.nan
    return found
