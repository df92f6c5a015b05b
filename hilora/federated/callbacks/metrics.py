"""Accuracies of the clients, measured after rounds, in `metrics.jsonl` and in the summary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from hilora.federated.callbacks.base import Callback, Round
from hilora.reporting.metrics import MetricsLog
from hilora.reporting.statistics import summarise

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation

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

    def begin(self, simulation: Simulation) -> None:
        self.log = MetricsLog(simulation.out / "metrics.jsonl", keep=simulation.round)

    def measure(self, simulation: Simulation, round: Round) -> None:
        every, number = simulation.settings.evaluate_every, round.record["round"]
        due = round.last or (every and number % every == 0)
        seen = simulation.population.seen
        scores = simulation.scores(seen, simulation.models(seen)) if due else {}
        self._measured = {split: one.correct for split, one in scores.items()}
        for split in ("val", "test"):
            round.record[split] = summarise(self._measured[split]) if scores else NOT_MEASURED

    def commit(self, simulation: Simulation, round: Round) -> None:
        if self._measured:
            self.tiers.pop(round.stage.tier, None)  # the last one measured stands last
            self.tiers[round.stage.tier], self.val = round.record["test"], round.record["val"]
            self.per_client = {"ids": simulation.population.seen.tolist()}
            self.per_client |= {split: correct.tolist() for split, correct in self._measured.items()}
            self.by_tier[round.stage.tier] = self.per_client["test"]
        self.log.append(round.record)

    def end(self, simulation: Simulation) -> None:
        if len(self.log.records) > simulation.round:  # a round that was stopped after it was written does not count
            self.begin(simulation)

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
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
