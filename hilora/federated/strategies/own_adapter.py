"""What methods whose clients have an adapter of their own beside a shared one have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.federated.client import ClientState, Models, Trained
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Sends, Stage, Upload, own, shared
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.streams import stream


class OwnAdapter(SharableHead):
    """The root is sent and averaged, a leaf stays with each client. What they hold of them, clients with a budget of
    ranks included, is the leading ranks."""

    tiers = ("root", "leaf")

    def start(self) -> None:
        super().start()
        self.root = self.problem.fresh("root", 1, stream(self.training.seed, "fresh adapters", 0))

    def stages(self) -> list[Stage]:
        return [Stage("root", self.total_rounds(), "root")]

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        root = self.fitted(shared(self.root, clients), clients)
        return Download(stage, {"root": root}, self.sent_head(clients))

    def sends(self, stage: Stage) -> Sends:
        return Sends({"root": "AB"}, head=self.shares_head)

    @property
    def sums(self) -> bool:
        return True

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        self.average_heads(upload)
        if upload.images.sum() > 0:
            self.root = self.mean(upload)
        return {}

    def mean(self, upload: Upload) -> AdapterTable:
        """The next root."""
        return self.averaging.mean(upload.tiers["root"], upload.images, self.root)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        leaf = state.filled("leaf", lambda: self.first(state.clients))
        return Models({"root": download.tiers["root"], "leaf": leaf}, self.heads(state, download))

    def first(self, clients: Tensor) -> AdapterTable:
        """The leaves that clients begin with."""
        draws = stream(self.training.seed, "fresh adapters", 1)
        return self.fitted(own(self.problem.fresh("leaf", self.problem.clients, draws, clients)), clients).taken()

    @abstractmethod
    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        """A client's round: it trains both adapters, and ends with `keep`."""

    def keep(self, state: ClientState, trained: Trained) -> Upload:
        """The clients keep their leaves, and their heads where these are not shared; they send the root."""
        state.put("leaf", trained.tiers["leaf"])
        self.keep_heads(state, trained)
        return trained.upload("root", head=self.shares_head)
