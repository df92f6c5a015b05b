"""What there is room for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hilora.federated.engine import device as capacity


def test_saved_bytes_are_activations_not_parameters() -> None:
    layers = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.Tanh())
    x = torch.randn(10, 8)
    # x for the first weight, its output for the GELU, that of the GELU for the second weight, tanh's own
    assert capacity.saved_bytes(lambda: layers(x)) == 4 * 10 * (8 + 16 + 16 + 8)


def test_free_memory_is_some() -> None:
    assert 10**6 < capacity.free_memory(torch.device("cpu")) < 10**14


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
    ],
)
def test_what_is_for_want_of_memory(error: RuntimeError, memory: bool) -> None:
    assert capacity.out_of_memory(error) == memory


def test_torch_says_so_when_the_cpu_has_no_memory_left() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert capacity.out_of_memory(caught.value)


@pytest.mark.parametrize(("faster", "dtype"), [(2.0, torch.bfloat16), (1.2, torch.float32), (0.3, torch.float32)])
def test_bf16_where_it_is_measured_to_pay(monkeypatch: pytest.MonkeyPatch, faster: float, dtype: torch.dtype) -> None:
    now = [0.0]
    linear = torch.nn.functional.linear

    def timed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        now[0] += 1 / faster if x.dtype == torch.bfloat16 else 1.0
        return linear(x, weight)

    monkeypatch.setattr(torch.nn.functional, "linear", timed)
    monkeypatch.setattr(capacity, "perf_counter", lambda: now[0])
    assert capacity.quick_dtype(torch.device("cpu"), 16) == dtype
