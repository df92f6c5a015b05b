"""What methods have in common whose clients first train alone, and are then grouped by what came of it."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload
from hilora.federated.strategies.base import Ask
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream

WARM, COLLECT, PROBE, SHARED = "warm", "collect", "probe", "shared"  # what clients are asked to do


class WarmedUp(SharableHead):
    """In the rounds of the root tier each client trains an adapter and its head by itself. All begin with one A, so
    that their B can be compared. Then they send the adapter once, `form` groups them, and the other rounds follow.
    Until groups are formed, clients go on alone.

    An unseen client trains for as many epochs from the same start, and sends its B, by which `place` gives it a place.
    """

    own_tier = "cluster"

    def stages(self) -> list[Stage]:
        alone = self.training.rounds["root"]
        return [
            Stage("cluster", alone, "root", WARM, private=True),
            Stage("cluster", self.total_rounds() - alone, "root", SHARED),
        ]

    def first(self) -> AdapterTable:
        """The adapter that all begin with."""
        return self.problem.fresh("cluster", 1, stream(self.training.seed, "fresh adapters"))

    # The server's half

    @property
    @abstractmethod
    def formed(self) -> bool:
        """Whether the clients are grouped yet."""

    @abstractmethod
    def form(self, upload: Upload) -> None:
        """Group the clients by what they trained alone, and make of it what the other rounds start from."""

    @abstractmethod
    def place(self, clients: Tensor, table: AdapterTable) -> None:
        """Give newcomers `[n]` a place, by the B that they trained."""

    @abstractmethod
    def adapters_for(self, stage: Stage, clients: Tensor) -> Download:
        """What clients are sent once they are grouped, without a head."""

    def begin(self, stage: Stage, clients: Tensor, ask: Ask) -> None:
        if stage.task == SHARED:
            upload = ask(clients, Download(stage._replace(task=COLLECT)))
            if len(upload.clients):
                self.average_heads(upload)
                self.form(upload)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        if stage.task == WARM or not self.formed:
            return Download(stage._replace(task=WARM))
        sent = self.adapters_for(stage, clients)
        return Download(sent.stage, sent.tiers, self.sent_head(clients))

    def sends(self, stage: Stage) -> Sends:
        if stage.task == PROBE:
            return Sends({"cluster": "B"})
        return Sends() if stage.task == WARM else Sends({"cluster": "AB"}, head=self.shares_head)

    def admit(self, clients: Tensor, ask: Ask) -> None:
        if self.formed:
            upload = ask(clients, Download(self.stages()[-1]._replace(task=PROBE)))
            worked = upload.rows(upload.images > 0)
            if len(worked.clients):
                self.place(worked.clients, worked.tiers["cluster"])

    # The clients' half

    def alone(self, state: ClientState, download: Download, trainer: Trainer) -> Upload | None:
        """What clients do beside the rounds that they share; None in one of these."""
        task, shares = download.stage.task, self.shares_head
        if task == COLLECT:
            models = self.by_itself(state)
            head = models.head.taken() if shares else None
            return Upload(state.clients, trainer.counts, {"cluster": models.tiers["cluster"].taken()}, head)
        if task == PROBE:
            epochs = max(1, self.training.rounds["root"]) * self.training.local_epochs
            trained = trainer.train(self.by_itself(state), "cluster", rates="root", epochs=epochs)
            return trained.upload("cluster", factors="B", head=False)
        if task == WARM:
            trained = trainer.train(self.by_itself(state), "cluster", rates=download.stage.rates)
            state.put("warm", trained.tiers["cluster"])
            state.put("head", trained.head)
            return trained.upload(head=False)
        return None

    def by_itself(self, state: ClientState) -> Models:
        """What clients have trained alone."""
        count = len(state.clients)
        warm = state.filled("warm", lambda: self.first().repeated(count))
        return Models({"cluster": warm}, state.filled("head", lambda: self.problem.head.repeated(count)))


def spread_out(labels: Tensor, clients: Tensor, everyone: int) -> Tensor:
    """The labels `[n, ...]` of some clients as those of N, `[N, ...]`; the others have the most frequent ones."""
    found = labels.mode(0).values.expand(everyone, *labels.shape[1:]).clone()
    found[clients] = labels
    return found
