"""A function of tensors that stay in place, which a GPU can replay as a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Replay:
    """Calls a function that takes nothing and leaves its results in tensors of its own.

    On CUDA its third call is captured as a graph, which all later ones replay: the device then works through a step
    without waiting for Python. What the function reads must stay where it was.
    """

    WARM_UP = 2  # calls that run as they are: kernels are compiled and memory is taken there

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self.function, self.device = function, device
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self.device.type != "cuda":
            return self.function()
        self.calls += 1
        if self.graph is None and self.calls <= self.WARM_UP:
            return self._on_a_side_stream()
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.function()
            self.graph = graph
        return self.graph.replay()

    def _on_a_side_stream(self) -> None:
        """As torch asks for before a capture."""
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)
