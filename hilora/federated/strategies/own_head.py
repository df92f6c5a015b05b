"""What methods whose clients have heads of their own have in common."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from hilora.federated.client import ClientState, Trained
from hilora.federated.protocol import Download, Head, Rows, Upload, shared
from hilora.federated.settings import Settings
from hilora.federated.strategies.base import Strategy, everyone_starts


class OwnHead(Strategy):
    """A client's head stays with it from round to round, and an unseen client has none to predict with before it
    trains."""

    own_rates = "root"

    @property
    def shares_head(self) -> bool:
        """Whether the head is averaged all the same."""
        return False

    @property
    def predicts_unseen(self) -> bool:
        return self.shares_head

    def start(self) -> None:
        self.head = self.problem.head

    def sent_head(self, clients: Tensor) -> Rows[Head] | None:
        """The head that clients `[n]` are sent, if it is shared."""
        return shared(self.head, clients) if self.shares_head else None

    def heads(self, state: ClientState, download: Download) -> Rows[Head]:
        """The clients' heads."""
        if download.head is not None:
            return download.head
        return state.filled("head", everyone_starts(self.problem.head, len(state.clients)))

    def keep_heads(self, state: ClientState, trained: Trained) -> None:
        """The clients keep what they trained, unless it is shared."""
        if not self.shares_head:
            state.put("head", trained.head)

    def average_heads(self, upload: Upload) -> None:
        """The server averages the heads that it was sent."""
        if upload.head is not None and upload.images.sum() > 0:
            self.head = self.averaging.mean(upload.head, upload.images, self.head)


class SharableHead(OwnHead):
    """The same with a choice: heads may be averaged in every round instead, over the clients that trained."""

    class Settings(Settings):
        shared_head: bool = Field(False, description="average the heads; else each client keeps its own")

    settings: Settings

    @property
    def shares_head(self) -> bool:
        return self.settings.shared_head
