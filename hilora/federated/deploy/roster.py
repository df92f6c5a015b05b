"""Which clients are there, and on which nodes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from hilora.federated.deploy.messages import Hello, MessageError, Present, Refused, of_bytes, to_bytes

log = logging.getLogger(__name__)
Answer = bytes | str
"""What a node sent back; as a text, why it sent nothing."""


class Courier(Protocol):
    """What brings messages to nodes, which have numbers, and their answers back."""

    def nodes(self) -> list[int]:
        """The nodes that are connected."""

    def exchange(self, messages: Mapping[int, bytes], kind: str, timeout: float) -> dict[int, Answer]:
        """Send each node a message of a kind (query, train or evaluate), and wait so many seconds for answers."""

    def post(self, messages: Mapping[int, bytes], kind: str, timeout: float) -> None:
        """Send messages, and do not wait; they are good for so many seconds."""

    def collect(self) -> dict[int, Answer]:
        """The answers to posted messages that have come since."""

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> Iterable[Any]:
        """Send Flower's own messages, and give the replies that come in so many seconds."""


class Roster:
    """Asks every node that connects which client it is.

    A client is one node at a time: the first that said so, as long as it is connected. Others that say the same are
    refused until then, and so is one that names no client of the run, or has another backbone.

    Args:
        courier: brings messages.
        clients: N.
        weights: checksum of the run's backbone.
        deadline: seconds in which a node is to say who it is.

    Attributes:
        connected: the node of each client that is there now.
        unseen: clients that come after the training.
        images: how many training images each client said that it has; None where that is a secret.
    """

    def __init__(self, courier: Courier, clients: int, weights: str, deadline: float) -> None:
        self.courier, self.clients, self.weights, self.deadline = courier, clients, weights, deadline
        self.connected: dict[int, int] = {}
        self.images: dict[int, int | None] = {}
        self.unseen: set[int] = set()
        self._said: dict[int, Present] = {}  # by node, in the order of arrival
        self._asked: dict[int, float] = {}  # by node, until when it may answer
        self._refused: dict[int, str] = {}

    def look(self) -> None:
        """See who is there now."""
        nodes = self.courier.nodes()
        for node, answer in sorted(self.courier.collect().items()):
            self._take(node, answer)
        now = time.monotonic()
        new = [n for n in nodes if n not in self._said and n not in self._refused and self._asked.get(n, 0) <= now]
        if new:
            self._asked |= dict.fromkeys(new, now + self.deadline)
            self.courier.post(dict.fromkeys(new, to_bytes(Hello())), "query", self.deadline)
        self._said = {node: said for node, said in self._said.items() if node in nodes}
        gone = [client for client, node in self.connected.items() if node not in nodes]
        for client in gone:
            del self.connected[client]
            log.warning("client %d is not connected any more", client)
        for node, said in self._said.items():
            self._enter(node, said)

    def _take(self, node: int, answer: Answer) -> None:
        if isinstance(answer, str):
            log.warning("node %d did not say which client it is: %s", node, answer)
            return
        try:
            said = of_bytes(answer, Present, Refused)
        except MessageError as error:
            said = Refused(reason=str(error))
        if isinstance(said, Refused):
            return self._refuse(node, said.reason)
        if said.client >= self.clients:
            return self._refuse(node, f"it says that it is client {said.client}, expected 0 to {self.clients - 1}")
        if said.backbone != self.weights:
            return self._refuse(node, f"client {said.client} has other weights of the backbone than the server")
        self._said[node] = said

    def _refuse(self, node: int, reason: str) -> None:
        self._refused[node] = reason
        log.warning("node %d is refused: %s", node, reason)

    def _enter(self, node: int, said: Present) -> None:
        holder = self.connected.setdefault(said.client, node)
        if holder == node:
            if self._refused.pop(node, None) is not None or said.client not in self.images:
                images = "" if said.images is None else f", with {said.images} images to train on"
                log.info("client %d is there%s", said.client, images)
            self.images[said.client] = said.images
            (self.unseen.discard if said.seen else self.unseen.add)(said.client)
        elif node not in self._refused:
            self._refuse(node, f"it says that it is client {said.client}, which node {holder} is")
