"""The server of a deployment: the loop of the simulation, with clients that are machines of their own."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.io.files import checksum
from hilora.errors import HiLoRAError
from hilora.federated.callbacks.base import Callback
from hilora.federated.callbacks.checkpoint import Checkpoint, restore
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.callbacks.progress import ProgressBar
from hilora.federated.callbacks.unseen import UnseenClients
from hilora.federated.deploy.answers import checked, counted, message_of
from hilora.federated.deploy.member import half
from hilora.federated.deploy.messages import Counts, Done, Errand, Lacks, MessageError, to_bytes
from hilora.federated.deploy.report import SharedReport
from hilora.federated.deploy.roster import Courier, Roster
from hilora.federated.deploy.secure_rounds import SecureRounds
from hilora.federated.deploy.settings import Asked
from hilora.federated.deploy.wire import order, together, uploaded
from hilora.federated.engine.device import find_device
from hilora.federated.loop import Loop, Work
from hilora.federated.protocol import Download, Stage, Upload
from hilora.models.backbone import Backbone
from hilora.reporting.clusters import clusters

log = logging.getLogger(__name__)


class NobodyAnsweredError(HiLoRAError, TimeoutError):
    """No client gave an answer that is of use, as often as the settings allow."""


class Deployment(Loop):
    """The training of one strategy on clients that a courier brings messages to.

    The server has the clients' numbers of images, what they upload, and how many of their images they predict right;
    their images and private states it cannot reach. A client that does not answer in time, or answers something that is
    of no use, is left out of the round, which the record of the round says with the reason. With `secure_aggregation`
    it has means of uploads alone, and asks for none outside of rounds; with that or `dp_clip` no numbers of images.

    Args:
        asked: the settings of the run.
        backbone: the frozen ViT, of the same weights as the clients have.
        courier: brings messages.
        callbacks: more than those that every run has.
        poll: seconds between two looks for clients while there are too few.

    Raises:
        MissingFileError: if there is no checkpoint to resume from; FileError: if it is of another run.
    """

    def __init__(
        self, asked: Asked, backbone: Backbone, courier: Courier, callbacks: Sequence[Callback] = (), poll: float = 1.0
    ) -> None:
        self.asked, self.backbone, self.courier, self.poll = asked, backbone, courier, poll
        self.noise_seed = secrets.randbits(63)  # nobody else is to know it
        server, self.engine, self.layout = half(asked, backbone, find_device(asked.run.device))
        usual = [Metrics(), UnseenClients(), *callbacks, ProgressBar(), SharedReport(), Checkpoint()]
        super().__init__(server, asked.run.out, usual)
        self._weights = checksum("", backbone.model.state_dict())
        self.roster = Roster(courier, asked.run.clients, self._weights, asked.run.deadline)
        self.id, self.known = secrets.token_hex(8), set[int]()
        self.secure = SecureRounds(server, courier, self.post, asked.run.deadline)
        asked.run.out.mkdir(parents=True, exist_ok=True)
        if asked.run.resume:
            restore(self)
        else:
            self._save()

    @property
    def seen(self) -> Tensor:
        return torch.tensor(sorted(self.known), dtype=torch.long)

    @property
    def unseen(self) -> Tensor:
        return torch.tensor(sorted(self.roster.unseen & set(self.roster.connected)), dtype=torch.long)

    def run(self) -> dict[str, Any]:
        self._gather()
        return super().run()

    def _gather(self) -> None:
        """Wait until there are as many clients as the run needs.

        Raises:
            NobodyAnsweredError: too few came.
        """
        run, told = self.asked.run, -1
        need, until = run.min_clients or run.clients, time.monotonic() + run.wait
        while True:
            self.roster.look()
            here = sorted(self.roster.connected)
            said = f"{len(here)} of {need} are here ({', '.join(map(str, here)) or 'none'})"
            if len(here) >= need:
                break
            if time.monotonic() >= until:
                raise NobodyAnsweredError(f"too few clients after {run.wait:g} s: {said}")
            if told != len(here):
                log.info("waiting for clients: %s", said)
                told = len(here)
            time.sleep(self.poll)
        log.info("%s begins: clients %s", self.name, ", ".join(map(str, here)))

    def _welcome(self, formed: bool) -> None:
        """Take in clients that came since. Once groups may have been `formed`, which is before the first round of the
        second stage, the method admits them as it does unseen ones."""
        self.roster.look()
        new = sorted(set(self.roster.connected) - self.roster.unseen - self.known)
        if new and formed:
            try:
                self.server.admit(
                    torch.tensor(new), lambda clients, sent: self._work(clients, sent, "probe", 0, 1).upload
                )
            except NobodyAnsweredError:
                log.warning("clients %s came and did not answer: they are not taken in yet", new)
                return
        if new and self.round:
            log.info("clients %s take part from round %d on", new, self.round + 1)
        self.known |= set(new)

    def _stage(self, stage: Stage) -> None:
        self._welcome(formed=self.stage > 1 or (self.stage == 1 and self.round_in_stage > 0))
        super()._stage(stage)

    def _round(self, stage: Stage) -> None:
        self._welcome(formed=self.stage > 0)
        super()._round(stage)

    def _sample(self, seen: Tensor, stage: Stage) -> Tensor:
        """Of the clients that are connected. The others are named, too, and are left out."""
        here = torch.tensor([client in self.roster.connected for client in seen.tolist()], dtype=torch.bool)
        return torch.cat([super()._sample(seen[here], stage), seen[~here]]).sort().values

    def work(self, clients: Tensor, download: Download, purpose: str, round: int = 0) -> Work:
        return self._work(clients, download, purpose, round, self.asked.run.patience)

    def _work(self, clients: Tensor, download: Download, purpose: str, round: int, attempts: int) -> Work:
        errand = self._errand(download, purpose, round)
        expected = self.server.expected(download.stage)
        sums = self.asked.run.secure_aggregation and self.secure.concerns(download.stage)
        if sums and purpose != "training":
            return Work(expected.rows(torch.empty(0, dtype=torch.long)), 0)
        for attempt in range(1, attempts + 1):
            if sums:
                found, left = self._sums(clients, download, errand)
            else:
                found, left = self._exchange(
                    clients, download, errand, "train", lambda answer: uploaded(checked(answer, Done, errand), expected)
                )
                for one in found.values():
                    self.post.receive(one)
            upload = self._received(clients, download, errand, found, left)
            if upload is not None:
                break
            log.error("%s: nobody answered, attempt %d of %d: %s", errand, attempt, attempts, left)
        else:
            raise NobodyAnsweredError(
                f"{errand}: nobody answered in {attempts} attempts of {self.asked.run.deadline:g} s; with resume=true "
                f"the run goes on from {self.out}. The last reasons: {left}"
            )
        notes = {"left_out": {str(client): reason for client, reason in left.items()}} if left else {}
        return Work(upload, 0 if self.asked.sizes_are_secret else int(upload.images.sum()), notes=notes)

    def _received(
        self, clients: Tensor, download: Download, errand: Errand, found: Mapping[int, Upload], left: dict[int, str]
    ) -> Upload | None:
        """What the strategy gets of the uploads of clients; the reasons are added why others are left out."""
        if not found:
            return None
        places = torch.isin(clients, torch.tensor(list(found))).nonzero().flatten()
        upload = together(list(found.values()))
        upload = self.reception(download.of(places), upload, errand.purpose, errand.number, len(self.known))
        left |= _named(self.reception.left_out, errand)
        return upload if len(self.reception.left_out) < len(found) else None

    def accuracies(self, clients: Tensor, personal: bool = False) -> dict[str, Tensor]:
        purpose, number = ("unseen", 0) if personal else ("models", self.round + 1)
        download = self.configured(clients)
        errand = self._errand(download, purpose, number)
        found, _ = self._exchange(
            clients, download, errand, "evaluate", lambda answer: counted(checked(answer, Counts, errand))
        )
        nothing = {"val": torch.nan, "test": torch.nan}
        by_client = [found.get(client, nothing) for client in clients.tolist()]
        return {split: torch.tensor([one[split] for one in by_client]) for split in ("val", "test")}

    def _errand(self, download: Download, purpose: str, number: int) -> Errand:
        return Errand(run=self.id, purpose=purpose, number=number, stage=download.stage, round=download.round)

    def _exchange(
        self, clients: Tensor, download: Download, errand: Errand, kind: str, take: Callable[[Any], Any]
    ) -> tuple[dict[int, Any], dict[int, str]]:
        """Send clients `[n]` a download; what `take` makes of the answers, by client, and why others gave none."""
        until = time.monotonic() + self.asked.run.deadline
        left = self._absent(clients, until)
        places = {client: place for place, client in enumerate(clients.tolist())}
        found: dict[int, Any] = {}
        open_ = [client for client in places if client not in left]
        for _ in range(2):  # once more to those that have lost what they were sent earlier
            answers = self._send(
                {client: download.of(torch.tensor([places[client]])) for client in open_}, errand, kind, until
            )
            open_ = []
            for client, answer in answers.items():
                if isinstance(answer, Lacks):
                    self.post.forget(client)
                    open_.append(client)
                    continue
                try:
                    found[client] = take(answer)
                except MessageError as error:
                    left[client] = str(error)
                    self.post.forget(client)
            if not open_:
                break
        left |= dict.fromkeys(open_, "lacks parts that it was sent")
        return dict(sorted(found.items())), _named(left, errand)

    def _sums(self, clients: Tensor, download: Download, errand: Errand) -> tuple[dict[int, Upload], dict[int, str]]:
        """As `_exchange`, but that the server learns no more than means."""
        left = self._absent(clients, time.monotonic() + self.asked.run.deadline)
        here = torch.tensor([client not in left for client in clients.tolist()]).nonzero().flatten()
        found, dropped = self.secure.collect(clients[here], download.of(here), errand, self.roster.connected)
        return found, _named(left | dropped, errand)

    def _absent(self, clients: Tensor, until: float) -> dict[int, str]:
        """Which clients are not there, once any is, or it is too late."""
        while not set(clients.tolist()) & set(self.roster.connected) and time.monotonic() < until:
            time.sleep(self.poll)
            self.roster.look()
        return {client: "is not connected" for client in clients.tolist() if client not in self.roster.connected}

    def _send(self, downloads: Mapping[int, Download], errand: Errand, kind: str, until: float) -> dict[int, Any]:
        """The clients' messages, or a text where there is none."""
        nodes = {client: self.roster.connected[client] for client in downloads}
        messages = {}
        for client, download in downloads.items():
            messages[nodes[client]] = to_bytes(order(download, errand, self.post.held_by(client)))
            self.post.send(torch.tensor([client]), download)
        remaining = max(until - time.monotonic(), 0.01)
        answers = self.courier.exchange(messages, kind, remaining) if messages else {}
        silent = f"no answer within {self.asked.run.deadline:g} s"
        return {client: message_of(answers.get(node, silent), client) for client, node in nodes.items()}

    def clusters(self) -> dict[str, Any] | None:
        """The groups that the method formed, as the summary has them."""
        found = self.server.clustering()
        return None if found is None else clusters(found.labels, None, None)

    def summary(self) -> dict[str, Any]:
        run = self.asked.run
        return {
            **super().summary(),
            "partition": "the clients' own" if self.asked.partition is None else self.asked.partition.name,
            "data": "the clients' own" if self.asked.partition is None else "divided among the clients",
            "backbone": self.backbone.name,
            "dtype": run.dtype,
            "clusters": self.clusters(),
            "arguments": run.plain(),
        }

    def identity(self) -> dict[str, Any]:
        settings, run = self.settings.plain(), self.asked.run
        del settings["clients_at_once"]
        return {
            **settings,
            **{f"{self.name}.{name}": value for name, value in self.server.settings.plain().items()},
            "strategy": self.name,
            "backbone": [self.backbone.name, self.backbone.size, self._weights],
            "dtype": run.dtype,
            "clients": run.clients,
            "classes": list(run.class_names),
            "secure_aggregation": run.secure_aggregation,
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "id": self.id, "known": sorted(self.known)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.id, self.known = state["id"], set(state["known"])


def _named(left: dict[int, str], errand: Errand) -> dict[int, str]:
    """Why clients are left out, in their order, and in the log."""
    for client, reason in sorted(left.items()):
        log.warning("round %d: left out client %d: %s", errand.number, client, reason)
    return dict(sorted(left.items()))
