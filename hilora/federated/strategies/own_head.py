"""What methods whose clients have heads of their own have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hilora.federated.engine.state import State, Trained, mean, one_for_all, put, size
from hilora.federated.strategies.base import Strategy


class OwnHead(Strategy):
    """A client's head stays with it from round to round, and an unseen client has none to predict with before it
    trains. With the option `shared_head` = 1 heads are averaged in every round instead, over the clients that trained.
    """

    own_rates = "root"
    options: ClassVar[Mapping[str, float]] = {"shared_head": 0}

    def start(self, head: State) -> None:
        self.head = one_for_all(head, torch.arange(self.clients)).taken()
        self.shares_head = bool(self.run.options.get("shared_head", 0))
        self.predicts_unseen = self.shares_head

    def keep_heads(self, clients: Tensor, trained: Trained) -> None:
        """Take in the heads that the clients `[n]` trained."""
        if not self.shares_head:
            put(self.head, clients, trained.head)
        elif trained.images.sum() > 0:
            self.head = one_for_all(mean(trained.head, trained.images), torch.arange(self.clients)).taken()

    def head_traffic(self) -> int:
        """Numbers of a head, if it travels."""
        return size(self.head) if self.shares_head else 0
