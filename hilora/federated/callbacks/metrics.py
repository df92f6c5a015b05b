"""Accuracies of the clients, measured after rounds, in `metrics.jsonl` and in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hilora.federated.callbacks.base import Callback, Round
from hilora.reporting.metrics import MetricsLog
from hilora.reporting.statistics import summarise

if TYPE_CHECKING:
    from hilora.federated.loop import Loop

NOT_MEASURED = summarise(torch.empty(0))


class Metrics(Callback):
    """Evaluates the seen clients as often as the settings say and at the end of each stage, and writes a line a round.

    Attributes:
        log: the lines.
    """

    name = "metrics"
    log: MetricsLog

    def __init__(self) -> None:
        self.tiers: dict[str, dict[str, float | None]] = {}
        self.val = NOT_MEASURED
        self.per_client: dict[str, list[Any]] = {}
        self.by_tier: dict[str, list[Any]] = {}
        self._measured: dict[str, Any] = {}

    def begin(self, loop: Loop) -> None:
        self.log = MetricsLog(loop.out / "metrics.jsonl", keep=loop.round)

    def measure(self, loop: Loop, round: Round) -> None:
        every, number = loop.settings.evaluate_every, round.record["round"]
        due = round.last or (every and number % every == 0)
        self._measured = loop.accuracies(loop.seen) if due else {}
        for split in ("val", "test"):
            round.record[split] = summarise(self._measured[split]) if due else NOT_MEASURED

    def commit(self, loop: Loop, round: Round) -> None:
        if self._measured:
            self.tiers.pop(round.stage.tier, None)  # the last one measured stands last
            self.tiers[round.stage.tier], self.val = round.record["test"], round.record["val"]
            self.per_client = {"ids": loop.seen.tolist()}
            self.per_client |= {split: correct.tolist() for split, correct in self._measured.items()}
            self.by_tier[round.stage.tier] = self.per_client["test"]
        self.log.append(round.record)

    def end(self, loop: Loop) -> None:
        if len(self.log.records) > loop.round:  # a round that was stopped after it was written does not count
            self.begin(loop)

    def summary(self, loop: Loop) -> Mapping[str, Any]:
        last = list(self.tiers.values())[-1] if self.tiers else NOT_MEASURED
        found = {"tiers": self.tiers, "final": last, "val": self.val, "per_client": self.per_client}
        return {
            **found,
            "per_client_by_tier": {tier: self.by_tier[tier] for tier in self.tiers if tier in self.by_tier},
        }

    def state_dict(self) -> dict[str, Any]:
        return {"tiers": self.tiers, "val": self.val, "per_client": self.per_client, "by_tier": self.by_tier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.tiers, self.val = state["tiers"], state["val"]
        self.per_client, self.by_tier = state["per_client"], state.get("by_tier", {})
