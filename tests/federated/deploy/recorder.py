"""A proxy between SuperNodes and a SuperLink that ends TLS on both sides, and keeps every byte that SuperNodes send."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import h11
from flwr.app import Message
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.supercore.inflatable.inflatable_object import iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

from tests.federated.deploy.certificates import Certificates


class Request(NamedTuple):
    """What a SuperNode asked of the SuperLink, or told it."""

    path: str
    headers: dict[str, str]
    body: bytes


class Recorder:
    """What was sent, connection by connection."""

    def __init__(self) -> None:
        self.port = 0
        self.sent: list[bytearray] = []
        self.answered: list[bytearray] = []

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def requests(self) -> list[Request]:
        """All that was sent, as HTTP."""
        return [request for stream in self.sent for request in _requests(bytes(stream))]

    def messages(self) -> list[Any]:
        """The messages of Flower's that were sent whole, with their content: of a run that was stopped the SuperLink
        takes no more."""
        objects: dict[str, bytes] = {}
        trees = []
        for request in self.requests():
            if request.path.endswith("/push-object"):
                pushed = PushObjectRequest.FromString(request.body)
                objects[pushed.object_id] = pushed.object_content
            elif request.path.endswith("/push-messages"):
                trees += PushMessagesRequest.FromString(request.body).message_object_trees
        whole = [tree for tree in trees if all(one.object_id in objects for one in iterate_object_tree(tree))]
        messages = [inflate_object_from_contents(tree.object_id, dict(objects)) for tree in whole]
        assert all(isinstance(message, Message) for message in messages)
        return messages


def _requests(stream: bytes) -> Iterator[Request]:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(stream)
    head, body = None, bytearray()
    while (event := connection.next_event()) not in (h11.NEED_DATA, h11.PAUSED):
        if isinstance(event, h11.Request):
            head, body = event, bytearray()
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            headers = {name.decode(): value.decode() for name, value in head.headers}
            yield Request(head.target.decode(), headers, bytes(body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            connection.start_next_cycle()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter, kept: bytearray) -> None:
    try:
        while data := await source.read(1 << 16):
            kept += data
            target.write(data)
            await target.drain()
    except OSError:  # a SuperNode that was killed
        pass
    finally:
        target.close()


async def _serve(recorder: Recorder, certificates: Certificates, port: int, ready: threading.Event) -> None:
    inward = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    inward.load_cert_chain(certificates.server, certificates.key)
    outward = ssl.create_default_context(cafile=str(certificates.authority))

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there_writer = await asyncio.open_connection("127.0.0.1", port, ssl=outward)
        sent, answered = bytearray(), bytearray()
        recorder.sent.append(sent)
        recorder.answered.append(answered)
        with suppress(asyncio.CancelledError):  # the recorder is closed before the SuperNodes
            await asyncio.gather(_pass_on(reader, there_writer, sent), _pass_on(there_reader, writer, answered))

    server = await asyncio.start_server(connected, "127.0.0.1", 0, ssl=inward)
    recorder.port = server.sockets[0].getsockname()[1]
    ready.set()
    await asyncio.Event().wait()


@contextmanager
def recorder(certificates: Certificates, port: int) -> Iterator[Recorder]:
    """Records what goes to a SuperLink at a port of this machine, by the address of the recorder."""
    made, ready, loop = Recorder(), threading.Event(), asyncio.new_event_loop()
    task = loop.create_task(_serve(made, certificates, port, ready))

    def run() -> None:
        try:
            loop.run_until_complete(task)
        except asyncio.CancelledError:
            rest = asyncio.all_tasks(loop)
            for other in rest:
                other.cancel()
            loop.run_until_complete(asyncio.gather(*rest, return_exceptions=True))
        finally:
            loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        assert ready.wait(30)
        yield made
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(30)
