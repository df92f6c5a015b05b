"""Where the time of a local epoch goes on a CPU, by kinds of operations: `python -m benchmarks.epoch_shares`."""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.federation import Federation
from benchmarks.operations.tensors import shapes
from hilora.federated.engine.device import DTYPES
from hilora.models.backbone import tune_for_cpu

KINDS = {
    "products with frozen weights": ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"),
    "products of adapters and attention": ("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::addmm_"),
    "copies": ("aten::copy_",),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "LayerNorm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "softmax": ("aten::_softmax", "aten::_softmax_backward_data"),
    "sums and scalings": ("aten::add", "aten::add_", "aten::sum", "aten::mul", "aten::mul_"),
    "images: resizing, patches": (
        "aten::_upsample_bicubic2d_aa",
        "aten::mkldnn_convolution",
        "aten::div_",
        "aten::sub_",
    ),
    "picking and joining adapters": ("aten::index", "aten::cat", "aten::index_add_", "aten::stack"),
}
REST = "everything else, with Python and the optimiser"


def shares(dtype: torch.dtype) -> dict[str, float]:
    """Kind → its part of the time, forward and backward, largest first; on one thread."""
    federation = Federation(shapes("cpu")[0], torch.device("cpu"), targets=("q", "v"))
    epoch = federation.epoch(None, dtype)
    epoch()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        epoch()
    kind_of = {name: kind for kind, names in KINDS.items() for name in names}
    times: Counter[str] = Counter()
    for event in found.key_averages():
        times[kind_of.get(event.key, REST)] += event.self_cpu_time_total
    return {kind: time / times.total() for kind, time in times.most_common()}


def main() -> None:
    tune_for_cpu()
    torch.set_num_threads(1)
    columns = {name: shares(dtype) for name, dtype in DTYPES.items()}
    print(f"{'% of the time':50}" + "".join(f"{name:>10}" for name in columns))
    for kind in columns["bfloat16"]:
        print(f"{kind:50}" + "".join(f"{100 * column[kind]:10.1f}" for column in columns.values()))


if __name__ == "__main__":
    main()
