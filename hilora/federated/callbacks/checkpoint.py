"""Where a run stands after a round, in a file to go on from."""

from __future__ import annotations

import hashlib
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hilora.adapters.table import AdapterTable, Stack, Values
from hilora.errors import FileError, MissingFileError
from hilora.federated.callbacks.base import Callback
from hilora.federated.protocol import Head

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation

KINDS = {
    "adapters": AdapterTable.of,
    "head": lambda tensors: Head(**tensors),
    "values": lambda tensors: Values(**tensors),
}
NAMES: dict[type[Stack], str] = {AdapterTable: "adapters", Head: "head", Values: "values"}
STACK = "a stack of"


class Checkpoint(Callback):
    """Saves the run after every round."""

    name = "checkpoint"

    def saved(self, simulation: Simulation) -> None:
        state = {"identity": simulation.identity(), **simulation.state_dict()}
        save_checkpoint(simulation.out / "checkpoint.pt", state)


def restore(simulation: Simulation) -> None:
    """Put a simulation where the checkpoint in its folder says.

    Raises:
        MissingFileError: if there is no checkpoint.
        FileError: if it is corrupt, or of another run; names what differs.
    """
    path = simulation.out / "checkpoint.pt"
    state = load_checkpoint(path)
    own, known = simulation.identity(), state.get("identity", {})
    differing = [name for name in {**own, **known} if known.get(name) != own.get(name)]
    if differing:
        raise FileError(
            f"the checkpoint in {simulation.out} is of another run: it differs in {', '.join(differing)}. "
            "Resume with the same settings, or choose another folder"
        )
    simulation.load_state_dict(state)


def checkpoint_dtype(folder: Path) -> str | None:
    """The arithmetic of the run that a folder has the checkpoint of, by name: what `auto` chose there is kept when it
    goes on. None where there is no checkpoint.

    Raises:
        FileError: if it is corrupt.
    """
    path = folder / "checkpoint.pt"
    if not path.is_file():
        return None
    found = load_checkpoint(path)["identity"].get("dtype")
    return None if found is None else str(found)


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, stacks, numbers and containers of them, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_suffix(".part")
    try:
        with open(partial, "wb") as file:  # by its path alone, torch says RuntimeError where the disk is full
            torch.save(_plain(state), file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, read without running anything that a file might say.

    Raises:
        MissingFileError: if there is none.
        FileError: if the file is corrupt or holds anything else.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no checkpoint {path} to resume from: start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"identity", "strategy", "round"} <= set(state):
            raise FileError("it holds something else")
        found: dict[str, Any] = _stacked(state)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise FileError(f"{path} is not a readable checkpoint: {error}") from error
    return found


def _plain(value: Any) -> Any:
    """The same with plain containers in the place of stacks."""
    if isinstance(value, Stack):
        return {STACK: NAMES[type(value)], "tensors": value.tensors()}
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _stacked(value: Any) -> Any:
    """What `_plain` was given."""
    if isinstance(value, dict):
        if STACK in value:
            return KINDS[value[STACK]](value["tensors"])
        return {key: _stacked(inner) for key, inner in value.items()}
    return [_stacked(inner) for inner in value] if isinstance(value, list) else value


def digest(model: nn.Module) -> str:
    """A hash of a model's tensors, to the bit: their names, shapes, dtypes and bytes."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
        state.update(_bytes(tensor))
    return state.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that what belongs together is written together."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt
