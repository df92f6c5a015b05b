"""`pytest tests/kernels --emulate sm_90`: the kernels' tests on emulated kernels, which fail on a race as well."""

from __future__ import annotations

import os
from functools import cache
from typing import Any
from unittest import mock

from hilora.kernels.emulator.driver import ARCHITECTURES
from hilora.kernels.emulator.launching import Emulator

_INTERPRETER = "TRITON_INTERPRET"


@cache
def install(architecture: str) -> Emulator:
    """Have the project's kernels compiled and emulated, in this process, before anything imports them.

    Args:
        architecture: `sm_80` or `sm_90`.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.pop(_INTERPRETER, None)  # it decides, as kernels are defined, what becomes of them
    emulator = Emulator(ARCHITECTURES[architecture])
    from hilora.kernels import launch, precompile

    precompile.plans()  # which imports all kernels
    os.environ[_INTERPRETER] = "1"  # so that kernels take tensors on the CPU

    def launcher(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        with mock.patch.dict(os.environ):
            del os.environ[_INTERPRETER]
            emulator.launch(kernel, grid, args, constants)

    launch.launcher = launcher
    launch.interpreting = lambda: False
    return emulator
