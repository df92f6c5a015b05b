"""What commands say of errors."""

from __future__ import annotations

import pytest
import torch

from hilora.errors import InvalidValueError, told


def test_a_bug_is_not_told_and_what_was_given_is() -> None:
    assert told(ValueError("a bug")) is None
    assert told(InvalidValueError("lr is\n-1")) == "lr is -1"
    assert told(FileNotFoundError(2, "No such file", "x")) == "[Errno 2] No such file: 'x'"


def test_full_memory_is_told_with_the_remedy() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**46, dtype=torch.uint8).fill_(1)
    for error in (caught.value, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")):
        assert str(told(error)).startswith("out of memory: lower clients_at_once")
