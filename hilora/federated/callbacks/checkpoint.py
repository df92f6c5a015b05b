"""Where a run stands after a round, in a file to go on from."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers and containers of them, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_suffix(".part")
    try:
        with open(partial, "wb") as file:  # by its path alone, torch says RuntimeError where the disk is full
            torch.save(state, file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, read without running anything that a file might say.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if the file is corrupt or holds anything else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path} to resume from: start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not {"config", "strategy", "round"} <= set(state):
            raise ValueError("it holds something else")
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        raise ValueError(f"{path} is not a readable checkpoint: {error}") from error
    return state
