"""What a federated method is: what a client trains, and what the server does with what came back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hilora.algorithms.clustering import Clustering
from hilora.federated.engine.state import Models, State, Trained
from hilora.federated.engine.work import Work
from hilora.federated.settings import RunConfig

Fresh = Callable[[str, int, torch.Generator], State]
"""New adapters, without effect as yet: (tier, how many, random stream) → `[how many, ...]`."""


class Stage(NamedTuple):
    """Rounds in which one tier is trained, with the learning rates of that tier or of another."""

    tier: str
    rounds: int
    rates: str


class Traffic(NamedTuple):
    """Numbers that a client sends and receives in a round."""

    up: int
    down: int


class Strategy(ABC):
    """A federated method on N clients, seen and unseen, named by their ids 0 to N − 1.

    A subclass keeps its state in attributes, names them in `kept`, and implements `start`, `stages`, `models`,
    `aggregate` and `traffic`; one whose clients do more in a round than to train once implements `round`.

    Attributes:
        tiers: which adapters its models have.
        own_tier: what an unseen client trains by itself in the end.
        own_rates: the tier whose learning rates it takes: the leaf's, which suit a start from what others trained.
        predicts_unseen: whether an unseen client can predict before it trains.
        factors: which of the adapters' factors are trained, as in `Task`.
        options: settings of its own, with their defaults (`RunConfig.options`).
        kept: attributes that make up the state, for checkpoints: tensors, numbers, or dicts and lists of these.
    """

    tiers: ClassVar[tuple[str, ...]]
    own_tier: ClassVar[str] = "leaf"
    own_rates: ClassVar[str] = "leaf"
    predicts_unseen: bool = True
    factors: ClassVar[str] = "AB"
    options: ClassVar[Mapping[str, float]] = {}
    kept: ClassVar[tuple[str, ...]]

    def __init__(self, run: RunConfig, fresh: Fresh, head: State, clients: int) -> None:
        """Start from fresh adapters and the head `[1, ...]`."""
        self.run, self.fresh, self.clients = run, fresh, clients
        self.start(head)

    @classmethod
    def adapted(cls, run: RunConfig) -> RunConfig:
        """The settings as the method takes them: here, without HiLoRA's penalties and its frozen head.

        Raises:
            ValueError: for an option that the method does not have.
        """
        unknown = sorted(set(run.options) - set(cls.options))
        if unknown:
            raise ValueError(f"{cls.__name__} has no options {unknown}, it has {sorted(cls.options) or 'none'}")
        own = {**cls.options, **run.options}
        return replace(run, gamma_root=0.0, gamma_cluster=0.0, head="follow", options=own)

    @abstractmethod
    def start(self, head: State) -> None:
        """Set up the state."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in their order."""

    def begin(self, tier: str, seen: Tensor, work: Work) -> None:  # noqa: B027 -- a hook
        """Before the first round of a stage. `seen` `[n]` are the clients that take part in the training."""

    @abstractmethod
    def models(self, clients: Tensor) -> Models:
        """What the clients `[n]` predict with now, and what they start training from."""

    def round(self, stage: Stage, clients: Tensor, work: Work) -> dict[str, Any]:
        """A round of the clients `[n]`; returns what `aggregate` says."""
        models = self.models(clients)
        trained = work.train(clients, models, stage.tier, rates=stage.rates, factors=self.factors)
        return self.aggregate(stage.tier, clients, trained)

    @abstractmethod
    def aggregate(self, tier: str, clients: Tensor, trained: Trained) -> dict[str, Any]:
        """Take in what the clients `[n]` trained in a round; returns what is worth a note in the metrics. `stop` True
        ends the stage."""

    @abstractmethod
    def traffic(self, tier: str) -> Traffic:
        """What a client sends and receives in a round of a stage; what it was sent before is not counted again."""

    def admit(self, clients: Tensor, work: Work) -> None:  # noqa: B027 -- a hook
        """Unseen clients arrive after the training."""

    def personalise(self, clients: Tensor, work: Work) -> Models:
        """What unseen clients `[n]` that were admitted predict with after they trained by themselves."""
        models, epochs = self.models(clients), self.run.unseen_epochs
        trained = work.train(clients, models, self.own_tier, rates=self.own_rates, epochs=epochs, factors=self.factors)
        return models.replaced(self.own_tier, trained)

    def clustering(self) -> Clustering | None:
        """The groups of the seen clients that the method formed, if it does."""
        return None

    def joined(self, clients: Tensor) -> Tensor:
        """The cluster of each of the clients `[n]`, -1 for none."""
        return torch.full((len(clients),), -1)

    def tables(self) -> tuple[dict[str, State], dict[str, State]]:
        """All adapters by tier, and the heads likewise, for saving."""
        everyone = self.models(torch.arange(self.clients))
        adapters = {tier: table.state for tier, table in everyone.tiers.items()}
        return adapters, {next(reversed(adapters)): everyone.head.state}

    def state_dict(self) -> dict[str, Any]:
        """The attributes `kept`."""
        return {name: getattr(self, name) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        if set(state) != set(self.kept):
            raise ValueError(f"this is not a state of {type(self).__name__}: it has {sorted(state)}")
        for name, value in state.items():
            setattr(self, name, value)

    def total_rounds(self) -> int:
        """All rounds of the run: what a strategy of a single tier trains for."""
        return sum(self.run.rounds.values())
