"""Whether bytes of something private are in a stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

WINDOW = 8


def needles(tensors: Iterable[Tensor], dtypes: Iterable[torch.dtype]) -> Iterator[bytes]:
    """The bytes of tensors and of all their rows, in several types. Rows that are of one value say nothing, and are
    left out, as are those that are so short that they are found by chance."""
    for tensor in tensors:
        for dtype in dtypes:
            value = tensor.detach().cpu().to(dtype).contiguous()
            rows = value.view(-1, value.shape[-1]) if value.dim() else value.view(1, 1)
            telling = rows[(rows != rows[:, :1]).any(1)]
            if len(telling) == 0:
                continue
            for part in (value, *telling):
                data = part.view(torch.uint8).numpy().tobytes()
                if len(data) > WINDOW:
                    yield data


def found(secrets: Iterable[bytes], streams: Iterable[bytes]) -> list[bytes]:
    """Those of the secrets that stand anywhere in a stream."""
    wanted = list(secrets)
    places = [_telling(secret) for secret in wanted]
    windows = np.array([secret[at : at + WINDOW] for secret, at in zip(wanted, places, strict=True)])
    keys = np.frombuffer(windows.astype(f"S{WINDOW}").tobytes(), np.uint64)
    hits: set[bytes] = set()
    for stream in streams:
        every = np.lib.stride_tricks.sliding_window_view(np.frombuffer(stream, np.uint8), WINDOW)
        there = np.unique(np.ascontiguousarray(every).view(np.uint64))
        for index in np.flatnonzero(np.isin(keys, there)):
            if wanted[index] in stream:
                hits.add(wanted[index])
    return sorted(hits)


def _telling(secret: bytes) -> int:
    """Where the window of a secret begins that has most different bytes, of some."""
    starts = range(0, len(secret) - WINDOW + 1, max(1, len(secret) // 64))
    return max(starts, key=lambda at: len(set(secret[at : at + WINDOW])))
