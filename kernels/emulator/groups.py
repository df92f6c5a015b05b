"""Asynchronous work in groups."""

from __future__ import annotations

import numpy as np

from .values import Array


class Groups:
    """Asynchronous work in groups that are committed and waited for in order, by each of several agents.

    A place notes the number of the group that works on it. Groups up to `done` have ended, as their agent knows; up to
    `known`, as all warps do: a barrier was passed since. No warp knows by itself that the others' products have ended.
    """

    def __init__(self, agents: int) -> None:
        self.committed = np.zeros(agents, np.int32)
        self.done = np.zeros(agents, np.int32)
        self.known = np.zeros(agents, np.int32)

    def commit(self, agents: Array) -> None:
        self.committed[agents] += 1

    def wait(self, agents: Array, pending: int) -> None:
        self.done[agents] = np.maximum(self.done[agents], self.committed[agents] - pending)

    def barrier(self, agents: Array) -> None:
        self.known[agents] = self.done[agents]
