"""Where a run stands after a round, in a file to go on from."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hilora.errors import FileError, MissingFileError
from hilora.federated.archive import packed, unpacked
from hilora.federated.callbacks.base import Callback
from hilora.files import write_bytes

if TYPE_CHECKING:
    from hilora.federated.loop import Loop

log = logging.getLogger(__name__)
CHECKPOINT = "checkpoint.safetensors"
PREVIOUS = "checkpoint.previous.safetensors"  # the one before, should the last one be damaged


class Checkpoint(Callback):
    """Saves the run after every round, and keeps the last two."""

    name = "checkpoint"

    def saved(self, loop: Loop) -> None:
        path, previous = loop.out / CHECKPOINT, loop.out / PREVIOUS
        content = packed({"identity": loop.identity(), **loop.state_dict()})
        if path.exists():
            os.replace(path, previous)
        write_bytes(path, content)


def restore(loop: Loop) -> None:
    """Put a run where the checkpoint in its folder says. It may have more rounds than the run had, in the stage that
    it was in or in later ones; of a finished run, in its last stage.

    Raises:
        MissingFileError: if there is no checkpoint.
        FileError: if it is damaged, or of another run; names what differs.
    """
    state = load_checkpoint(loop.out)
    try:
        loop.load_state_dict(_agreed(loop, state))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise FileError(f"{loop.out / CHECKPOINT} lacks parts of a checkpoint, or has others: {error!r}") from error


def _agreed(loop: Loop, state: dict[str, Any]) -> dict[str, Any]:
    """The state that a run goes on from.

    Raises:
        FileError: if it is of another run; names what differs.
    """
    own, known = loop.identity(), state["identity"]
    differing = [name for name in {**own, **known} if known.get(name) != own.get(name)]
    longer = _before_more_rounds(loop, state) if differing == ["rounds"] else None
    if longer is not None:
        return longer
    if differing:
        said = "; ".join(f"{name} was {_short(known.get(name))}, now {_short(own.get(name))}" for name in differing)
        raise FileError(
            f"the checkpoint in {loop.out} is of another run: {said}. Resume with the same settings, or choose "
            "another folder"
        )
    return state


def _before_more_rounds(loop: Loop, state: dict[str, Any]) -> dict[str, Any] | None:
    """What a run with more rounds goes on from; None where those that are over would have been others."""
    rounds = [stage.rounds for stage in loop.stages]
    place, done = state["stage"], state["round_in_stage"]
    if place == len(state["asked"]):  # all is over: the last stage goes on, from before the unseen clients arrived
        path = loop.out / (PREVIOUS if state["finished"] else CHECKPOINT)
        state = unpacked(path) if path.is_file() else state
        place, done = place - 1, state["trained"][-1] if state["trained"] else 0
        if state["finished"] or done < state["asked"][-1]:  # a strategy that ended the stage itself would do so again
            return None
        state = {**state, "stage": place, "round_in_stage": done, "trained": state["trained"][:-1]}
    same = len(rounds) == len(state["asked"]) and rounds[:place] == state["asked"][:place]
    return state if same and 0 < done < rounds[place] else None


def has_checkpoint(folder: Path) -> bool:
    """Whether there is a run in a folder to go on from."""
    return any((folder / name).is_file() for name in (CHECKPOINT, PREVIOUS))


def checkpoint_dtype(folder: Path) -> str | None:
    """The arithmetic of the run that a folder has the checkpoint of, by name: what `auto` chose there is kept when it
    goes on. None where there is no checkpoint.

    Raises:
        FileError: if it is damaged.
    """
    return str(load_checkpoint(folder)["identity"]["dtype"]) if has_checkpoint(folder) else None


def load_checkpoint(folder: Path) -> dict[str, Any]:
    """The last checkpoint of a run, or the one before where that is damaged.

    Raises:
        MissingFileError: if there is none.
        FileError: if none can be read.
    """
    there = [folder / name for name in (CHECKPOINT, PREVIOUS) if (folder / name).is_file()]
    if not there:
        raise MissingFileError(f"there is no checkpoint in {folder} to resume from: start without --resume")
    damaged: FileError | None = None
    for path in there:
        try:
            state = unpacked(path)
            known = state.get("identity")
            if not (isinstance(known, dict) and "dtype" in known and {"strategy", "round"} <= set(state)):
                raise FileError(f"{path} is no checkpoint of a run")
        except FileError as error:
            damaged = damaged or error
            continue
        if damaged is not None:
            log.warning("%s; going on from the checkpoint before it", damaged)
        return state
    assert damaged is not None
    raise damaged


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
