"""What a federated method is: a server's half and a client's half, between which messages travel."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.table import AdapterTable, Stack
from hilora.algorithms.clustering import Clustering
from hilora.errors import InvalidValueError
from hilora.federated.averaging import Averaging
from hilora.federated.budgets import Budgets
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Head, Rows, Sends, Stage, Upload, fitted
from hilora.federated.settings import Settings, TrainingSettings, shares


class Fresh(Protocol):
    """Makes new adapters, without effect as yet."""

    def __call__(
        self, tier: str, slots: int, generator: torch.Generator, rows: Tensor | None = None, /
    ) -> AdapterTable:
        """So many adapters of a tier from a random stream, `[slots, ...]`; or the `rows` `[n]` of them alone."""


GIVEN = frozenset({"settings", "problem", "training"})
"""Attributes of a strategy that it is made with, and that are no state of its own."""

Ask = Callable[[Tensor, Download], Upload]
"""Sends clients `[n]` a download and gives what they send back."""


class Problem(NamedTuple):
    """What both halves know from the start.

    Attributes:
        training: how clients train.
        clients: N.
        fresh: makes new adapters.
        head: the head `[1, ...]` that all begin with.
        true_groups: int64 `[N]`, of an oracle; None where there are no groups.
        budgets: of the clients.
        blocks: for each shape of projection, int64 `[P]`, the block that each is in, from 0 to L − 1.
    """

    training: TrainingSettings
    clients: int
    fresh: Fresh
    head: Head
    true_groups: Tensor | None = None
    budgets: Budgets = Budgets(torch.empty(0, dtype=torch.long))
    blocks: Sequence[Tensor] = ()

    @property
    def depth(self) -> int:
        """L, the number of blocks that hold adapters."""
        return 1 + max(int(of.max()) for of in self.blocks)


class Strategy(ABC):
    """A federated method on N clients, seen and unseen, named by their ids 0 to N − 1.

    The simulation has two instances of it, one for each half, and only the messages pass between them. The server's
    half keeps its state in attributes, which make up its checkpoint: tensors, stacks, numbers, texts, and dicts and
    lists of these; those whose names begin with an underscore are left out. It starts in `start`, gives in
    `configure` what it has for clients and takes in by `aggregate` what they send. The client's half has nothing but
    the private states of its clients: it trains in `local` and says in `models` what they predict with.

    Attributes:
        name: what the method is called on the command line and in files; the class's by default.
        Settings: its own settings, beside those that all methods share.
        tiers: which adapters its models have.
        own_tier: what an unseen client trains by itself in the end.
        own_rates: the tier whose learning rates it takes: the leaf's, which suit a start from what others trained.
        factors: which of the adapters' factors are trained and sent: "AB", one of them, or "".
        travels: whether messages travel at all.
        unequal: which budgets of unequal clients it keeps: "ranks", "layers".
        merged: the tiers that its clients merge into their base model.
    """

    name: ClassVar[str] = ""
    Settings: ClassVar[type[Settings]] = Settings
    tiers: ClassVar[tuple[str, ...]]
    own_tier: ClassVar[str] = "leaf"
    own_rates: ClassVar[str] = "leaf"
    factors: ClassVar[str] = "AB"
    travels: ClassVar[bool] = True
    unequal: ClassVar[frozenset[str]] = frozenset()
    merged: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, **settings: Any) -> None:
        """A method with some of its own settings.

        Raises:
            InvalidValueError: for a setting that it does not have, or a value that does not fit.
        """
        self.settings = self.Settings(**settings)

    def check(self, training: TrainingSettings) -> None:
        """Whether it can be trained so, as far as that is known before there are a model and clients.

        Raises:
            InvalidValueError: clients have budgets that the method does not keep, or of more ranks than any of its
                tiers has.
        """
        name = self.name or type(self).__name__
        for kind, given in (("rank", training.rank_budgets), ("layer", training.layer_budgets)):
            if given is not None and f"{kind}s" not in self.unequal:
                raise InvalidValueError(f"{name} has no use for budgets of {kind}s: leave {kind}_budgets out")
        if training.byte_budgets is not None:
            if not self.unequal:
                raise InvalidValueError(f"{name} has no use for budgets: leave byte_budgets out")
            if training.rank_budgets is not None or training.layer_budgets is not None:
                raise InvalidValueError("byte_budgets say what ranks and layers clients have: give no other budgets")
        if training.rank_budgets is not None:
            room = self.most_ranks(training)
            if max(most for _, most in shares(training.rank_budgets)) > room:
                raise InvalidValueError(
                    f"rank_budgets={training.rank_budgets!r}: {name} has adapters of rank {room} at most: give no "
                    "budget above that, or a higher rank"
                )

    def join(self, problem: Problem) -> Self:
        """Take up a problem; both halves do.

        Raises:
            InvalidValueError: as `check` does; or clients have budgets of more blocks than there are.
        """
        self.check(problem.training)
        layers = problem.budgets.layers
        if layers is not None and int(layers.max()) > problem.depth:
            raise InvalidValueError(
                f"layer_budgets={problem.training.layer_budgets!r}: the model has {problem.depth} blocks with "
                "adapters: give no budget above that"
            )
        self.problem, self.training = problem, problem.training
        return self

    def most_ranks(self, training: TrainingSettings) -> int:
        """How many ranks a client can hold of one adapter, whatever its budget."""
        return max(training.rank[tier] for tier in self.tiers)

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        """The adapters of its models."""
        return HiLoRAConfig(
            r={tier: training.rank[tier] for tier in self.tiers},
            lora_alpha={tier: training.lora_alpha[tier] for tier in self.tiers},
            target_modules=training.target_modules,
            lora_dropout=training.lora_dropout,
            tiers=self.tiers,
        )

    def of_blocks(self, table: AdapterTable, blocks: Tensor) -> AdapterTable:
        """The adapters `[n, ...]` of the blocks that each client has, bool `[n, L]`; zeros for the others."""
        return table.having([blocks[:, of] for of in self.problem.blocks])

    def fitted(self, rows: Rows[AdapterTable], clients: Tensor) -> Rows[AdapterTable]:
        """Adapters for clients `[n]`: of each the leading ranks that its client can hold."""
        return fitted(rows, self.problem.budgets.rank(clients, rows.table.r))

    # The server's half

    @property
    def averaging(self) -> Averaging:
        """How to take means of what clients sent."""
        return Averaging(self.training)

    @abstractmethod
    def start(self) -> None:
        """Set up the server's state."""

    @abstractmethod
    def stages(self) -> list[Stage]:
        """The stages in their order."""

    def begin(self, stage: Stage, clients: Tensor, ask: Ask) -> None:  # noqa: B027 -- a hook
        """Before the first round of a stage. `clients` `[n]` are those that take part in the training."""

    @abstractmethod
    def configure(self, stage: Stage, clients: Tensor) -> Download:
        """What the clients `[n]` are sent in the coming round of a stage."""

    def serve(self, stage: Stage, clients: Tensor) -> Download:
        """What the clients `[n]` predict with now, and unseen ones train by themselves: here, what they are sent."""
        return self.configure(stage, clients)

    def sends(self, stage: Stage) -> Sends:
        """What a client sends back in a stage: here, what `local` does, and nothing where a stage is private. Messages
        of another layout are not taken."""
        return Sends() if stage.private else Sends({stage.tier: self.factors} if self.factors else {}, head=True)

    def expected(self, stage: Stage) -> Upload:
        """A message of the layout that `sends` says, of one client; its values do not count."""
        sent, one = self.sends(stage), torch.zeros(1, dtype=torch.long)
        tiers = {tier: self.problem.fresh(tier, 1, torch.Generator()).only(f) for tier, f in sent.tiers.items()}
        if sent.partial:
            everything = torch.ones(1, self.problem.depth, dtype=torch.bool)
            tiers = {tier: self.of_blocks(table, everything) for tier, table in tiers.items()}
        choice = one + sent.choices - 1 if sent.choices else None
        scores = torch.zeros(1, sent.scores, dtype=torch.float32) if sent.scores else None
        return Upload(one, one, tiers, self.problem.head if sent.head else None, choice, scores)

    @property
    def sums(self) -> bool:
        """Whether means of what clients change of what they are sent are all that the server needs."""
        return False

    @abstractmethod
    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        """Take in what clients sent in a round; returns what is worth a note in the metrics. `stop` True ends the
        stage."""

    def admit(self, clients: Tensor, ask: Ask) -> None:  # noqa: B027 -- a hook
        """Unseen clients arrive after the training."""

    def clustering(self) -> Clustering | None:
        """How the groups of the seen clients were found, if the method found some by distances."""
        return None

    # The client's half

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        """A round of n clients: here, to train the stage's tier and send it back with the head."""
        stage, models = download.stage, self.models(state, download, trainer)
        trained = trainer.train(models, stage.tier, rates=stage.rates, factors=self.factors)
        return trained.upload(stage.tier, factors=self.factors)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        """What n clients predict with, and start training from: here, what they were sent."""
        assert download.head is not None
        return Models(download.tiers, download.head)

    def personalise(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        """What n unseen clients predict with after they trained by themselves."""
        models, epochs = self.models(state, download, trainer), self.training.unseen_epochs
        how = self.personal_training()
        trained = trainer.train(models, self.own_tier, rates=self.own_rates, epochs=epochs, factors=self.factors, **how)
        return models.after(trained)

    def personal_training(self) -> dict[str, Any]:
        """How an unseen client trains, beyond its tier, rates and epochs: keywords of `Trainer.train`."""
        return {}

    def tables(self, everyone: Models) -> tuple[dict[str, AdapterTable], dict[str, dict[str, Tensor]]]:
        """All adapters by tier, and the tensors of the heads likewise, for saving."""
        adapters = {tier: rows.table for tier, rows in everyone.tiers.items()}
        heads = everyone.head.table.tensors()
        if everyone.composition is not None and everyone.composition.trained:
            heads = heads | everyone.composition.tensors()
        return adapters, {next(reversed(adapters)): heads}

    # Both

    @property
    def predicts_unseen(self) -> bool:
        """Whether an unseen client can predict before it trains."""
        return True

    def total_rounds(self) -> int:
        """All rounds of the run: what a strategy of a single tier trains for."""
        return sum(self.training.rounds.values())

    def state_dict(self) -> dict[str, Any]:
        """The server's state: its attributes, but for what it was made with and those that begin with an underscore."""
        return {name: value for name, value in vars(self).items() if name not in GIVEN and not name.startswith("_")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name in set(self.state_dict()) - set(state):
            delattr(self, name)
        for name, value in state.items():
            setattr(self, name, value)


def everyone_starts(table: Stack, count: int) -> Callable[[], Stack]:
    """What gives n clients the same row to begin with."""
    return lambda: table.repeated(count)
