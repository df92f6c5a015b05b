"""Without a GPU, Triton's interpreter or an emulator runs the kernels; it has to be chosen before they are defined."""

import os

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
if os.environ.pop("PYTEST_XDIST_WORKER", None):  # a suite that a test starts is not part of this one
    os.environ["OMP_NUM_THREADS"] = "1"  # processes side by side, also those that tests start, have a core each
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--emulate", choices=("sm_80", "sm_90"), help="run compiled kernels by an emulator, on the CPU")


def pytest_configure(config: pytest.Config) -> None:
    if architecture := config.getoption("--emulate"):
        from tests.kernels.emulator import plugin

        plugin.install(architecture)
    elif not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
