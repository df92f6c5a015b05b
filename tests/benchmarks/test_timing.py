"""What is measured; that it is quick or slow is not for tests."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.timing import DEVICE, Timing, peak_bytes, ready, rotation, take_turns


def test_steps_take_turns_over_all_inputs() -> None:
    seen: list[tuple[str, int]] = []
    inputs = [(torch.tensor(i, device=DEVICE),) for i in range(2)]
    turns = {name: ready(lambda i, name=name: seen.append((name, id(i))), inputs) for name in "ab"}
    found = take_turns(turns, seconds=0.01)
    assert set(found) == {"a", "b"}
    for timing in found.values():
        assert 0 < timing.low <= timing.seconds <= timing.high
    assert {key for _, key in seen} == {id(one) for (one,) in inputs}
    names = [name for name, _ in seen]
    turns_taken = [name for name, before in zip(names, ["", *names], strict=False) if name != before]
    assert len(turns_taken) >= 2 * (1 + 3)
    assert turns_taken == ["a", "b"] * (len(turns_taken) // 2)


def test_peak_is_the_most_held_at_once() -> None:
    def step(x: Tensor) -> Tensor:
        y = x + 1  # 4 MB
        z = y * 2  # and 4 more
        del y
        return z + 1  # and again

    x = torch.zeros(2**20, device=DEVICE)
    assert abs(peak_bytes(step, (x,)) - 2 * 4 * 2**20) < 2**16


def test_a_share_of_the_work() -> None:
    assert Timing(1.0, 0.5, 2.0, None).over(0.25) == (4.0, 2.0, 8.0, None)
    assert Timing(1.0, 0.5, 2.0, 3.0).over(0.5).host == 6.0


def test_one_set_of_inputs_without_a_gpu() -> None:
    assert (rotation(100) == 1) == (DEVICE == "cpu")
