"""Unseen clients arrive after the training: what is there serves them, and then they train by themselves."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hilora.federated.callbacks.base import Callback
from hilora.reporting.statistics import summarise

if TYPE_CHECKING:
    from hilora.federated.loop import Loop

log = logging.getLogger(__name__)


class UnseenClients(Callback):
    """Admits them, and measures their test accuracy before and after they trained an adapter of their own."""

    name = "unseen"

    def __init__(self) -> None:
        self.accuracy: dict[str, float | None] = {"zero_leaf": None, "leaf": None}
        self.per_client: dict[str, list[Any]] = {}

    def trained(self, loop: Loop) -> None:
        unseen, strategy = loop.unseen, loop.server
        if not len(unseen):
            return
        strategy.admit(unseen, loop.asks("probe"))
        self.per_client["unseen_ids"] = unseen.tolist()
        if strategy.predicts_unseen:
            self._score(loop, "zero_leaf", unseen)
        if loop.settings.unseen_epochs:
            self._score(loop, "leaf", unseen, personal=True)
        figures = ", ".join(f"{name} {value:.1%}" for name, value in self.accuracy.items() if value is not None)
        log.info("%s: %d unseen clients, %s", loop.name, len(unseen), figures)

    def _score(self, loop: Loop, name: str, unseen: Tensor, personal: bool = False) -> None:
        correct = loop.accuracies(unseen, personal)["test"]
        self.accuracy[name] = summarise(correct)["mean"]
        self.per_client[f"unseen_{name}"] = correct.tolist()

    def summary(self, loop: Loop) -> Mapping[str, Any]:
        return {"unseen": self.accuracy, "per_client": self.per_client}

    def state_dict(self) -> dict[str, Any]:
        return {"accuracy": self.accuracy, "per_client": self.per_client}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.accuracy, self.per_client = state["accuracy"], state["per_client"]
