"""Without a GPU, Triton's interpreter runs the kernels; it has to be chosen before they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
if os.environ.pop("PYTEST_XDIST_WORKER", None):  # a suite that a test starts is not part of this one
    os.environ["OMP_NUM_THREADS"] = "1"  # processes side by side, also those that tests start, have a core each
    torch.set_num_threads(1)
