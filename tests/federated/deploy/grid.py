"""Flower's grid without a network: nodes answer at once, in this process, and can be made to fail."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

Answers = Callable[[Message], Message | None]


class Node:
    """A SuperNode: a client's app, its context, and what goes wrong there.

    Attributes:
        fault: takes each message in the place of the app; None where there is no answer, or it calls `answer` itself.
    """

    def __init__(
        self, number: int, app: Callable[[], ClientApp], config: dict[str, Any], run_config: dict[str, Any]
    ) -> None:
        self.number, self.make, self.app = number, app, app()
        self.context = Context(1, number, dict(config), RecordDict(), dict(run_config))
        self.fault: Answers | None = None
        self.answered: list[str] = []

    def answer(self, message: Message) -> Message:
        """What the app says; an error of Flower's where it raises."""
        self.answered.append(message.metadata.message_type)
        try:
            return self.app(message, self.context)
        except Exception as error:
            return Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)

    def failed(self, message: Message) -> Message:
        """What Flower says for an app that raised."""
        return Message(Error(2, "no more disk"), reply_to=message)

    def restart(self) -> None:
        """What Flower kept is gone."""
        self.context.state = RecordDict()

    def renew(self) -> None:
        """The node's process is another one, and what Flower kept is gone."""
        self.app = self.make()
        self.restart()


class Grid:
    """What the server's app uses of Flower's `Grid`."""

    def __init__(self, nodes: Iterable[Node]) -> None:
        self.nodes = {node.number: node for node in nodes}
        self.numbers = itertools.count(1)
        self.replies: dict[str, Message] = {}
        self.sent: list[Message] = []
        self.before: Callable[[Message], None] = lambda message: None

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        names = []
        for message in messages:
            name = str(next(self.numbers))
            message.metadata.__dict__["_message_id"] = name
            self.sent.append(message)
            self.before(message)
            node = self.nodes.get(message.metadata.dst_node_id)
            reply = None if node is None else (node.fault or node.answer)(copy.deepcopy(message))
            if reply is not None:
                self.replies[name] = reply
            names.append(name)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(name) for name in list(message_ids) if name in self.replies]
