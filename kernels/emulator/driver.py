"""Triton's own driver and launcher for NVIDIA GPUs over a stand-in for libcuda, compiled by gcc on first use."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ARCHITECTURES = {"sm_80": 80, "sm_90": 90}


class Launched(NamedTuple):
    """What the driver was asked to launch.

    Attributes:
        arguments: addresses of the kernel's arguments.
    """

    grid: tuple[int, int, int]
    threads: int
    shared: int
    arguments: Any


_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_uint64, *[ctypes.c_uint] * 5, ctypes.POINTER(ctypes.c_void_p))

_KEPT: list[object] = []  # what the library points to


@cache
def library() -> ctypes.CDLL:
    """The stand-in for libcuda, in a folder where Triton looks for it."""
    folder = Path(tempfile.mkdtemp(prefix="emulated-libcuda-"))
    path = folder / "libcuda.so.1"
    source = Path(__file__).with_name("libcuda.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", path, source], check=True)
    (folder / "libcuda.so").symlink_to(path.name)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def idle() -> Iterator[None]:
    """Launches do nothing."""
    library().emulator_set_callback(None)
    yield
    library().emulator_set_callback(_KEPT[-1])


def install(arch: int, launched: Callable[[Launched], None]) -> None:
    """Make Triton believe in a GPU of this architecture, e.g. 90; its launches go to `launched`."""
    libcuda = library()
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class Driver(CudaDriver):  # type: ignore[misc]
        """All of it but what asks torch or the GPU."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_device_capability = lambda device=None: divmod(arch, 10)
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_current_stream = lambda device: 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", arch, 32)

    def called(function: int, x: int, y: int, z: int, threads: int, shared: int, arguments: Any) -> None:
        launched(Launched((x, y, z), threads, shared, arguments))

    callback = _CALLBACK(called)
    libcuda.emulator_set_callback(callback)
    _KEPT.append(callback)
    triton.runtime.driver.set_active(Driver())
