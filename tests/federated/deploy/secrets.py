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


class Haystack:
    """Streams of bytes, made ready to be searched for many secrets."""

    def __init__(self, streams: Iterable[bytes]) -> None:
        self.all = b"\0".join(streams)
        windows = np.lib.stride_tricks.sliding_window_view(np.frombuffer(self.all, np.uint8), WINDOW)
        self.windows, self.first = np.unique(np.ascontiguousarray(windows).view(np.uint64), return_index=True)

    def found(self, secrets: Iterable[bytes]) -> set[bytes]:
        """Those of the secrets that stand anywhere in a stream."""
        wanted = sorted(set(secrets))
        starts = [_telling(secret) for secret in wanted]
        keys = b"".join(secret[at : at + WINDOW] for secret, at in zip(wanted, starts, strict=True))
        keys_there = np.frombuffer(keys, np.uint64)
        place = np.searchsorted(self.windows, keys_there).clip(max=len(self.windows) - 1)
        hits = set()
        for index in np.flatnonzero(self.windows[place] == keys_there):
            secret, begin = wanted[index], int(self.first[place[index]]) - starts[index]
            if self.all.startswith(secret, max(begin, 0)) or secret in self.all:
                hits.add(secret)
        return hits


def _telling(secret: bytes) -> int:
    """Where the window of a secret begins that has most different bytes, of some."""
    starts = range(0, len(secret) - WINDOW + 1, max(1, len(secret) // 64))
    return max(starts, key=lambda at: len(set(secret[at : at + WINDOW])))
