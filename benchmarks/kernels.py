"""Each kernel by itself, beside the bytes of its tensors: `python -m benchmarks.kernels`.

The launches of a layer's forward and backward pass and of a penalty, each repeated on the same tensors, which the
caches may hold; the whole passes stand below them, and the base product by torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.layer_calls import again, launches, passes, size
from benchmarks.timing import DEVICE, SCALES, SECONDS, ready, take_turns
from hilora.kernels import gram_penalty, use_backend
from hilora.kernels.backends import TRITON

SHAPES = {"toy": (64, 64), "cpu": (788, 192), "cuda": (12_608, 768)}  # rows and width, enough for all kernels


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default=DEVICE)
    scale = parser.parse_args(arguments).scale
    rows, width = SHAPES[scale]
    print(f"{rows} rows, width {width}, bf16: {'µs':>30} {'MB':>9} {'GB/s':>9}")
    for name in TRITON:
        of = passes(rows, width, name)
        for way, call in (("forward", of.forward), ("backward", of.backward)):
            _table(f"{name}, {way}", call, scale)
    B = torch.randn(2 if scale == "toy" else 24, 4, width, 8, device=DEVICE)
    with use_backend("fused"):
        _table("penalty", partial(gram_penalty, B, [B[:, :1].clone(), B.clone()], [0.1, 0.1]), scale)
    x, weight = (torch.randn(n, width, device=DEVICE, dtype=torch.bfloat16) for n in (rows, 3 * width))
    dy = F.linear(x, weight)
    _print("the base product, forward", partial(F.linear, x, weight), 0, scale)
    _print("the base product, backward", lambda: dy @ weight, 0, scale)


def _table(title: str, call: Callable[[], object], scale: str) -> None:
    with launches() as found:
        call()
    print(title)
    for one in found:
        _print(f"  {one[0].__name__}", again(one), size(one[2]), scale)
    _print("  all", call, 0, scale)


def _print(name: str, call: Callable[[], object], moved: int, scale: str) -> None:
    seconds = take_turns({"": ready(call, [()])}, SECONDS[scale] / 5)[""].seconds
    rate = f"{moved / 1e6:9.2f} {moved / seconds / 1e9:9.1f}" if moved else ""
    print(f"{name:50} {1e6 * seconds:9.2f} {rate}", flush=True)


if __name__ == "__main__":
    main()
