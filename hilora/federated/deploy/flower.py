"""The apps that Flower's deployment engine runs: a `ServerApp` and a `ClientApp` for every strategy of this package.

    # server_app.py                                          # client_app.py
    from hilora.federated.deploy.flower import server_app     from hilora.federated.deploy.flower import client_app
    app = server_app()                                        app = client_app()

What to do stands in the run config (`DeploymentSettings`, `TrainingSettings`, the strategy's own settings, with dashes
in their names); where a client's images, weights and private state are, in its node config.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from torch import Tensor

from hilora.errors import HiLoRAError, InvalidValueError
from hilora.federated.callbacks.report import RESULTS
from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers import read_images
from hilora.federated.deploy.member import Member, all_of, share_of
from hilora.federated.deploy.messages import Hello, MessageError, Order, Refused, of_bytes, to_bytes
from hilora.federated.deploy.private import Private, load_private, save_private
from hilora.federated.deploy.roster import Answer
from hilora.federated.deploy.secure import is_secured, secured, vector
from hilora.federated.deploy.server import Deployment
from hilora.federated.deploy.settings import Asked, asked
from hilora.federated.engine.device import find_device
from hilora.federated.engine.trainer import Diverged
from hilora.files import set_aside
from hilora.locks import claimed
from hilora.models.backbone import Backbone, load_backbone

log = logging.getLogger(__name__)
POLL = 0.2  # seconds between two looks for answers; the grid's own way to wait sleeps for three
RECORD, ARRAY, STYPE = "hilora", "message", "hilora.safetensors"
Read = Callable[[Context], tuple[ImageSet, ImageSet]]
"""Reads a client's training and test images."""


def record(data: bytes) -> RecordDict:
    """A message of ours in a message of Flower's."""
    return RecordDict({RECORD: ArrayRecord({ARRAY: Array("uint8", (len(data),), STYPE, data)})})


def data_of(content: RecordDict) -> bytes:
    """The message of ours in a message of Flower's.

    Raises:
        MessageError: there is none.
    """
    found = content.get(RECORD)
    array = found.get(ARRAY) if isinstance(found, ArrayRecord) else None
    if array is None or array.stype != STYPE:
        raise MessageError(f"a message has no array {ARRAY!r} of {STYPE} in its record {RECORD!r}")
    return bytes(array.data)


class GridCourier:
    """Brings messages by Flower's `Grid` (`roster.Courier`)."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._posted: set[str] = set()

    def nodes(self) -> list[int]:
        return sorted(self.grid.get_node_ids())

    def exchange(self, messages: Mapping[int, bytes], kind: str, timeout: float) -> dict[int, Answer]:
        return _answers(self._replies(_addressed(messages, kind, timeout), timeout))

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        lasting = inf if timeout is None else timeout
        return self._replies([_until(message, timeout) for message in messages], lasting)

    def _replies(self, messages: list[Message], timeout: float) -> list[Message]:
        """The replies that come in so many seconds."""
        until = time.monotonic() + timeout
        waiting = set(self.grid.push_messages(messages))
        found: list[Message] = []
        while waiting:
            found += self._pulled(waiting)
            if not waiting or time.monotonic() >= until:
                break
            time.sleep(POLL)
        return found

    def post(self, messages: Mapping[int, bytes], kind: str, timeout: float) -> None:
        self._posted |= set(self.grid.push_messages(_addressed(messages, kind, timeout)))

    def collect(self) -> dict[int, Answer]:
        return _answers(self._pulled(self._posted)) if self._posted else {}

    def _pulled(self, waiting: set[str]) -> list[Message]:
        """The replies that are there, to messages that are not waited for any longer."""
        replies = list(self.grid.pull_messages(waiting))
        waiting -= {reply.metadata.reply_to_message_id for reply in replies}
        return replies


def _addressed(messages: Mapping[int, bytes], kind: str, timeout: float) -> list[Message]:
    return [Message(record(data), node, kind, ttl=timeout) for node, data in messages.items()]


def _until(message: Message, timeout: float | None) -> Message:
    """A message that is good for so many seconds."""
    said = message.metadata
    return Message(message.content, said.dst_node_id, said.message_type, ttl=timeout, group_id=said.group_id)


def _answers(replies: Iterable[Message]) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    for reply in replies:
        if reply.has_error():
            answer: Answer = f"Flower says: {reply.error.reason or f'error {reply.error.code}'}"
        else:
            try:
                answer = data_of(reply.content)
            except MessageError as error:
                answer = str(error)
        found[reply.metadata.src_node_id] = answer
    return found


def server_app() -> ServerApp:
    """The server."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        what = asked(context.run_config)
        with claimed(what.run.out) as ours:
            if not ours:
                raise InvalidValueError(f"another process is writing to out={what.run.out}: give another folder")
            if not what.run.resume:
                set_aside(what.run.out, RESULTS)
            Deployment(what, _backbone(what, what.run.weights), GridCourier(grid)).run()

    app.main()(main)
    return app


def client_app(read: Read | None = None) -> ClientApp:
    """A client.

    Args:
        read: reads the client's images, in the place of `data` in its node config.
    """
    app = ClientApp()
    members: dict[Any, Member] = {}  # a process may answer several messages

    def member(context: Context) -> Member:
        key = (context.node_id, context.run_id)
        if key not in members:
            members.clear()
            members[key] = _member(context, read)
        return members[key]

    def query(message: Message, context: Context) -> Message:
        return _answered(message, lambda data: (of_bytes(data, Hello), member(context).present())[1])

    def train(message: Message, context: Context) -> Message:
        if is_secured(message):
            return _summed(message, context, lambda: member(context))
        return _answered(message, lambda data: _work(data, member(context), context, Member.answer))

    def evaluate(message: Message, context: Context) -> Message:
        return _answered(
            message, lambda data: _work(data, member(context), context, partial(Member.answer, measure=True))
        )

    app.query()(query)
    app.train()(train)
    app.evaluate()(evaluate)
    return app


def _answered(message: Message, answer: Callable[[bytes], Any]) -> Message:
    """The reply to a message."""
    try:
        said = answer(data_of(message.content))
    except Exception as error:
        said = Refused(reason=_reason(error))
    return Message(record(to_bytes(said)), reply_to=message)


def _summed(message: Message, context: Context, member: Callable[[], Member]) -> Message:
    """The reply to a message of a secure aggregation; an error of Flower's, which makes the client drop out of it."""

    def work(data: bytes) -> list[Tensor]:
        mine = member()
        upload, download = _work(data, mine, context, Member.train)
        return vector(upload, download, mine.strategy.training.dp_clip)

    try:
        return secured(message, context, work)
    except Exception as error:
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, _reason(error)), reply_to=message)


def _reason(error: Exception) -> str:
    """What the server is told of what went wrong: the reason where that is about what it sent or what it is to set. All
    else may name files or classes of the client's: it stands in the client's own log."""
    if isinstance(error, MessageError | Diverged):
        log.error("%s", error)
        return str(error)
    log.error("%s", error, exc_info=None if isinstance(error, HiLoRAError) else error)
    return f"{type(error).__name__} at the client, whose log says more"


def _work(data: bytes, member: Member, context: Context, does: Callable[[Member, Order, Private], Any]) -> Any:
    """Do what an order says, with the client's state in its file, or in Flower's context where it names no folder."""
    order: Order = of_bytes(data, Order)
    folder, run = context.node_config.get("state-dir"), order.errand.run
    if folder:
        private = load_private(Path(str(folder)), member.id, run, member.method)
    else:
        private = _in_context(context, member, run)
    said = does(member, order, private)
    if folder:
        save_private(Path(str(folder)), private)
    else:
        context.state = record(private.to_bytes())
    return said


def _in_context(context: Context, member: Member, run: str) -> Private:
    if RECORD not in context.state:
        return Private(member.id, run, member.method)
    return Private.of_bytes(data_of(context.state), member.id, run, member.method)


def _member(context: Context, read: Read | None) -> Member:
    what, node = asked(context.run_config), context.node_config
    client = node.get("client-id", node.get("partition-id"))
    if not isinstance(client, int) or isinstance(client, bool) or not 0 <= client < what.run.clients:
        raise InvalidValueError(f"node config: client-id is {client!r}, expected 0 to {what.run.clients - 1}")
    backbone = _backbone(what, Path(str(node["weights"])) if node.get("weights") else None)
    seed = what.training.seed
    if read is not None:
        train, test = read(context)
    elif node.get("data"):
        train, test = read_images(str(node["data"]), backbone.size, seed)
    else:
        raise InvalidValueError("node config: data is missing: expected the folder of the client's images, or glyphs")
    if what.partition is None:
        images = all_of(train, test, client, seed, seen=not node.get("unseen", False))
    else:
        images = share_of(train, test, what.partition, client, seed)
    return Member(what, backbone, images, client, find_device(str(node.get("device", "cpu"))))


def _backbone(what: Asked, weights: Path | None) -> Backbone:
    return load_backbone(what.run.backbone, weights, what.run.img_size)
