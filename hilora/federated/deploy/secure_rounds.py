"""Rounds of a deployment in which the server learns sums of what clients changed, and nothing of any one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flwr.app import Message
from torch import Tensor

from hilora.errors import InvalidValueError
from hilora.federated.deploy.messages import Errand, to_bytes
from hilora.federated.deploy.roster import Courier
from hilora.federated.deploy.secure import SecureAggregationError, mean_upload, secure_mean
from hilora.federated.deploy.wire import order
from hilora.federated.engine.post import Post
from hilora.federated.protocol import Download, Stage, Upload
from hilora.federated.strategies.base import Strategy
from hilora.federated.sums import groups

RANGE = 8.0
"""No number of an update can change by more in a round. With `dp_clip` none can change by more than that."""


class SecureRounds:
    """Asks clients for their updates by secure aggregation, one sum for each group that is sent the same.

    Args:
        server: the server's half of the strategy.
        courier: brings messages.
        post: what clients hold, and what was moved.
        deadline: seconds for each of the four steps of a sum.
    """

    def __init__(self, server: Strategy, courier: Courier, post: Post, deadline: float) -> None:
        self.server, self.courier, self.post, self.deadline = server, courier, post, deadline
        self.bound = server.training.dp_clip or RANGE

    def concerns(self, stage: Stage) -> bool:
        """Whether clients send anything in a stage that there can be a sum of."""
        expected = self.server.expected(stage)
        return bool(expected.tiers) or expected.head is not None

    def collect(
        self, clients: Tensor, download: Download, errand: Errand, nodes: Mapping[int, int]
    ) -> tuple[dict[int, Upload], dict[int, str]]:
        """The uploads of clients `[n]`, which say no more than the mean of each group, and why others are in none.

        Args:
            clients: who is there.
            download: what they are sent, in their order.
            errand: what they are to do.
            nodes: the node of each.
        """
        group, found, left = groups(download), dict[int, Upload](), dict[int, str]()
        for number in group.unique():
            places = (group == number).nonzero().flatten()
            members, heard, reason = clients[places], _Heard(self.courier, self.deadline), "dropped out"
            try:
                upload = self._summed(members, download.of(places), errand, nodes, heard)
            except (SecureAggregationError, InvalidValueError) as error:
                reason = str(error)
            else:
                found |= {int(one): upload.rows(upload.clients == one) for one in upload.clients}
            for client in members.tolist():
                self.post.up[client] += heard.bytes.get(nodes[client], 0)
                if client not in found:
                    left[client] = heard.reasons.get(nodes[client], reason)
                    self.post.forget(client)  # it may have lost what it was sent
        return dict(sorted(found.items())), dict(sorted(left.items()))

    def _summed(
        self, clients: Tensor, download: Download, errand: Errand, nodes: Mapping[int, int], heard: _Heard
    ) -> Upload:
        """The uploads of a group, of those that stayed.

        Raises:
            InvalidValueError: they are too few; SecureAggregationError: too few stayed.
        """
        place_of = {nodes[client]: place for place, client in enumerate(clients.tolist())}

        def learn(places: Tensor) -> tuple[list[Any], Tensor]:
            orders = {}
            for node, place in place_of.items():
                one = download.of(torch.tensor([place]))
                orders[node] = to_bytes(order(one, errand, self.post.held_by(int(clients[place]))))
            mean = secure_mean(heard, orders, self.bound, self.deadline)
            self.post.send(clients, download)
            return mean.arrays, torch.tensor([place_of[node] for node in mean.nodes])

        return mean_upload(self.server.expected(download.stage), download, clients, learn)


class _Heard:
    """Brings Flower's messages, and remembers how many bytes each node answered, or why it did not."""

    def __init__(self, courier: Courier, deadline: float) -> None:
        self.courier, self.deadline = courier, deadline
        self.bytes, self.reasons = dict[int, int](), dict[int, str]()

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        sent = list(messages)
        replies = list(self.courier.send_and_receive(sent, timeout=timeout))
        silent = {one.metadata.dst_node_id for one in sent} - {one.metadata.src_node_id for one in replies}
        self.reasons |= dict.fromkeys(silent, f"no answer within {self.deadline:g} s")
        for reply in replies:
            node = reply.metadata.src_node_id
            if reply.has_error():
                self.reasons[node] = f"Flower says: {reply.error.reason or f'error {reply.error.code}'}"
            else:
                self.bytes[node] = self.bytes.get(node, 0) + _weight(reply)
        return replies


def _weight(reply: Message) -> int:
    """How many bytes of keys, shares and masked numbers are in a reply."""
    values = [value for record in reply.content.config_records.values() for value in record.values()]
    parts = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return sum(len(part) for part in parts if isinstance(part, bytes))
