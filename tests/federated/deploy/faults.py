"""Nodes that answer something else than they should."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Message

from hilora.federated.archive import packed, unpacked
from hilora.federated.deploy.flower import data_of, record
from tests.federated.deploy.grid import Node

Tree = dict[str, Any]


def silent(node: Node, kind: str = "train", times: int | None = None) -> None:
    """The node does not answer messages of a kind, so many times or ever."""
    left = [times]

    def fault(message: Message) -> Message | None:
        if message.metadata.message_type != kind or left[0] == 0:
            return node.answer(message)
        left[0] = None if left[0] is None else left[0] - 1
        return None

    node.fault = fault


def changed(node: Node, change: Callable[[Tree], Tree | None], kind: str = "train") -> None:
    """The node changes what it says to messages of a kind."""

    def alter(data: bytes) -> bytes:
        tree = unpacked(data)
        return packed(change(tree) or tree)

    sends(node, alter, kind)


def sends(node: Node, change: Callable[[bytes], bytes], kind: str = "train") -> None:
    """The node sends other bytes."""

    def fault(message: Message) -> Message | None:
        reply = node.answer(message)
        if message.metadata.message_type != kind:
            return reply
        return Message(record(change(data_of(reply.content))), reply_to=message)

    node.fault = fault


def received(message: Message) -> Tree:
    """What is in a message."""
    return unpacked(data_of(message.content))
