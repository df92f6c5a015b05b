"""Without a GPU, Triton's interpreter runs the kernels; it has to be chosen before they are defined."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic algorithms need it
if "PYTEST_XDIST_WORKER" in os.environ:  # processes side by side, also those that tests start, have a core each
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
