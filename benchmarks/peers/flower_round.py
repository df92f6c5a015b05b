"""Rounds in Flower's simulation engine, on Ray: the clients of `peft_loop` in `ClientApp`s, a message each a round."""

from __future__ import annotations

import json
import queue
import threading
from dataclasses import replace
from functools import cache
from time import sleep
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation
from torch import Tensor

from benchmarks.federation import Federation, Round
from benchmarks.peers.peft_loop import PeftLoop
from hilora.adapters.table import AdapterTable
from hilora.federated.protocol import Head, Rows
from hilora.federated.settings import TIERS

client_app = ClientApp()


@cache  # of a Ray actor, which serves many clients
def _trainer(shape: str, threads: int) -> tuple[Federation, PeftLoop]:
    torch.set_num_threads(threads)
    federation = Federation(Round(*json.loads(shape)), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return federation, PeftLoop(federation)


@client_app.train()  # type: ignore[untyped-decorator, unused-ignore]
def train(message: Message, context: Context) -> Message:
    """A local epoch of one client, from the leaf and the head in the message."""
    given = message.content["config"]
    federation, peft = _trainer(given["shape"], given["threads"])
    state = message.content["arrays"].to_torch_state_dict()
    own = torch.zeros(1, dtype=torch.long)
    models = federation.models.of(torch.tensor([given["client"]]))
    leaf = Rows(AdapterTable([state["A"][None]], [state["B"][None]]), own)
    head = Rows(Head(state["weight"][None], state["bias"][None]), own)
    models = replace(models, tiers={**models.tiers, TIERS[-1]: leaf}, head=head)
    adapters, heads = peft.train(federation.images, [federation.orders()[given["client"]]], models)
    trained = {"A": adapters.A[0][0], "B": adapters.B[0][0], "weight": heads.weight[0], "bias": heads.bias[0]}
    return Message(content=RecordDict({"arrays": ArrayRecord(trained), "config": given}), reply_to=message)


class FlowerRounds:
    """A simulation that waits to be asked for rounds.

    Args:
        federation: the clients; Ray's actors make the same.
        actors: how many work at once, each with its share of the threads.
    """

    def __init__(self, federation: Federation, actors: int = 2) -> None:
        self.federation = federation
        self.asked: queue.Queue[bool] = queue.Queue()
        self.answers: queue.Queue[Any] = queue.Queue()
        self.threads = max(1, torch.get_num_threads() // actors)
        resources: Any = {
            "client_resources": {"num_cpus": self.threads, "num_gpus": 1 / actors * torch.cuda.is_available()}
        }
        resources["init_args"] = {"num_cpus": self.threads * actors}
        server_app = ServerApp()
        server_app.main()(self._serve)
        self.thread = threading.Thread(
            target=run_simulation,
            args=(server_app, client_app, federation.shape.clients, "ray", resources),
            daemon=True,
        )
        self.thread.start()

    def round(self) -> list[Tensor]:
        """B of the leaves and weights of the heads of all clients."""
        self.asked.put(True)
        found = self.answers.get(timeout=600)
        if isinstance(found, Exception):
            raise found
        return list(found)

    def close(self) -> None:
        self.asked.put(False)
        self.thread.join(timeout=60)

    def _serve(self, grid: Grid, context: Context) -> None:
        try:
            while len(nodes := sorted(grid.get_node_ids())) < self.federation.shape.clients:
                sleep(0.1)
            while self.asked.get():
                self.answers.put(self._one_round(grid, nodes))
        except Exception as error:
            self.answers.put(error)

    def _one_round(self, grid: Grid, nodes: list[int]) -> list[Tensor]:
        shape, models = json.dumps(self.federation.shape), self.federation.models
        messages = []
        for client, node in enumerate(nodes):
            start = models.of(torch.tensor([client]))
            leaf, head = start.tiers["leaf"].taken(), start.head.taken()
            state = {"A": leaf.A[0], "B": leaf.B[0], "weight": head.weight, "bias": head.bias}
            arrays = ArrayRecord({name: value[0] for name, value in state.items()})
            config = ConfigRecord({"client": client, "shape": shape, "threads": self.threads})
            content = RecordDict({"arrays": arrays, "config": config})
            messages.append(Message(content=content, message_type="train", dst_node_id=node))
        replies = {}
        for reply in grid.send_and_receive(messages):
            replies[reply.content["config"]["client"]] = reply.content["arrays"].to_torch_state_dict()
        return [torch.stack([replies[client][name] for client in range(len(nodes))]) for name in ("B", "weight")]
