"""What a device has room for, and which arithmetic it is quick at."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.data.memory import available_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Of a backbone's arithmetic, by name."""


def find_device(name: str | None) -> torch.device:
    """A device by its name, such as cpu or cuda:1, that this machine has; a GPU, if there is one, where it has none.

    Raises:
        InvalidValueError: it has none of that name.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts it
        known = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise InvalidValueError(
            f"there is no device {name!r} here, expected one of {', '.join(known)}, or another that torch was built for"
        ) from error
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU, or available to this process on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else available_memory()


def saved_bytes(function: Callable[[], object]) -> int:
    """Memory of what a function computes and autograd keeps for its gradients, parameters aside."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor if tensor._base is None else tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()  # alive until the sum is taken, lest addresses are used twice
        total = sum(kept.values())
    del result
    return total


def quick_dtype(device: torch.device, width: int) -> torch.dtype:
    """bfloat16 where it pays, else float32: on GPUs from Ampere on, and on a CPU on which a product as wide as the
    model's takes two thirds of the time at most, as it does with AMX or AVX-512-bf16. On a CPU this is measured."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float32
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(1024, width, dtype=dtype), torch.ones(3 * width, width, dtype=dtype)
        times = []
        for _ in range(8):
            started = perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(perf_counter() - started)
        seconds[dtype] = min(times)
    return torch.bfloat16 if 1.5 * seconds[torch.bfloat16] < seconds[torch.float32] else torch.float32


def out_of_memory(error: RuntimeError) -> bool:
    """Whether torch raised this for want of memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
