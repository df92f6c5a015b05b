"""The batched engine: many clients trained in one forward pass of the backbone that they share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.table import Stack
from hilora.federated.client import Models, Trained
from hilora.federated.data.images import ImageSet, augment, draw
from hilora.federated.engine.blocks import Parts
from hilora.federated.engine.placement import all_share, arranged
from hilora.federated.engine.predictor import Predictor
from hilora.federated.engine.shared_pass import SharedPass, Task
from hilora.federated.settings import TrainingSettings
from hilora.federated.streams import stream
from hilora.models.backbone import Backbone


class BatchedEngine(Predictor):
    """Trains the clients whose models a `Predictor` holds.

    The backbone is the same for all and does not change, so the gradients of the clients do not mix: a step is that of
    G separate trainings. Every client draws its batches from a random stream of its own; how many clients are trained
    at once changes nothing but rounding.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: HiLoRAConfig,
        settings: TrainingSettings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(backbone, config, settings, device, dtype)
        self._ready: tuple[tuple[object, ...], SharedPass] | None = None

    def train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        task: Task,
        ids: Tensor,
        purpose: str,
        round: int = 0,
        parts: Parts | None = None,
    ) -> Trained:
        """Local training of n clients, one tier and the head of each.

        Args:
            images: of all clients.
            shares: for each of the n clients, the indices of its images, `[n_i]`; may be empty.
            models: what the clients start from.
            task: what they train.
            ids: `[n]`, which clients these are, for their random streams.
            purpose: of the training, and `round`: likewise.
            parts: which blocks they train, and have; all by default.

        Raises:
            InvalidValueError: for parts of other clients or blocks.
        """
        if parts is not None:
            self.blocks.check(parts, len(shares))
        order = sorted(range(len(shares)), key=lambda i: -len(shares[i]))  # alike sizes together: fewer idle rows
        counts = torch.tensor([len(share) for share in shares])
        results: list[tuple[list[int], Trained]] = []

        def train(members: list[int], room: int) -> None:
            streams = [stream(self.settings.seed, purpose, round, int(ids[i])) for i in members]
            # Without images, so that turns have one size, and a graph that was captured for one serves the next.
            idle = (room - len(members)) * (self.device.type == "cuda")
            own = [shares[i] for i in members] + [counts.new_empty(0)] * idle
            places = torch.tensor(members + members[:1] * idle)
            picked, own_parts = models.of(places), None if parts is None else parts.of(places)
            with torch.random.fork_rng():  # of the dropout's draws
                torch.manual_seed(streams[0].initial_seed())
                results.append((members, self._train(images, own, picked, task, streams, own_parts)))

        self._in_turns(order, images, train)
        return _in_order(results, ids, counts * task.epochs)

    def _train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        task: Task,
        streams: list[torch.Generator],
        parts: Parts | None,
    ) -> Trained:
        """What G clients trained, idle ones included, in memory of its own."""
        bench = self._prepared(images, models, task, parts)
        training, batch = bench.training, self.settings.batch_size
        steps = -(-torch.tensor([len(share) for share in shares]) // batch)  # [G]
        training.begin(steps * task.epochs)
        for _ in range(task.epochs):
            for pixels, labels in self._epoch(images, shares, streams):
                training.step(pixels, labels)
        count = len(streams)
        cpu = torch.device("cpu")

        def kept(value: Tensor) -> Tensor:
            return value.detach()[:count].to(cpu, copy=True)

        return Trained(
            torch.arange(count),
            {tier: bench.placement.table(tier).rows(torch.arange(count)).to(cpu) for tier in task.tiers},
            bench.head.each(kept),
            bench.composition.each(kept) if bench.composition is not None and bench.composition.trained else None,
            steps[:count],
            kept(training.loss / (steps * task.epochs).to(training.loss)),
        )

    def _prepared(self, images: ImageSet, models: Models, task: Task, parts: Parts | None) -> SharedPass:
        """The training of clients with their values in place; the one before serves again where all shapes agree."""
        tiers, head = arranged(self.banks, models.tiers, task.tiers), models.head.taken()
        shapes = [tensor.shape for rows in tiers.values() for tensor in (*rows.table.tensors().values(), rows.slot)]
        unequal = [tier for tier, rows in tiers.items() if (rows.table.rank < rows.table.r).any()]
        scaled = [tier for tier, rows in tiers.items() if rows.table.scale is not None]
        shared = [tier for tier, rows in tiers.items() if all_share(rows)]
        composed = None if models.composition is None else models.composition.key
        key = (
            task._replace(epochs=0),
            composed,
            str(shapes),
            str(unequal),
            str(scaled),
            str(shared),
            len(head),
            images.images.shape[1:],
            None if parts is None else parts.present is None,
        )
        if self._ready is None or self._ready[0] != key:
            self._ready = None  # its memory is free before more is taken
            clients, batch = len(head), self.settings.batch_size
            pixels = torch.zeros(clients, batch, *images.images.shape[1:], dtype=torch.uint8, device=self.device)
            self._ready = key, SharedPass(self, tiers, head, models.composition, task, pixels, parts)
        bench = self._ready[1]
        bench.put(tiers, head, models.composition, parts)
        self.model.train()
        return bench

    def _epoch(
        self, images: ImageSet, shares: list[Tensor], streams: list[torch.Generator]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The clients' images in this epoch's order, a batch of each at a time, as not all of them may fit memory:
        uint8 `[G, b, 3, h, w]`, labels `[G, b]`, -1 where there is no image."""
        batch, place = self.settings.batch_size, images.images.device
        rows = max(-(-len(share) // batch) * batch for share in shares)
        index = torch.full((len(shares), rows), -1)
        draws = torch.zeros(len(shares), rows, 3, dtype=torch.long)
        height, width = images.images.shape[2:]
        for client, (share, generator) in enumerate(zip(shares, streams, strict=False)):  # idle ones have no stream
            index[client, : len(share)] = share[torch.randperm(len(share), generator=generator)]
            if self.settings.augment:
                draws[client, : len(share)] = draw(len(share), height, width, generator, images.mirrors)
        labels = torch.where(index >= 0, images.labels[index.clamp_min(0)], -1).to(self.device)
        index, draws = index.clamp_min(0).to(place), draws.to(place)
        for step in range(rows // batch):
            part = slice(step * batch, (step + 1) * batch)
            pixels = images.images[index[:, part]]
            if self.settings.augment:
                pixels = augment(pixels.flatten(0, 1), draws[:, part].flatten(0, 1)).view(pixels.shape)
            yield pixels, labels[:, part]

    def _forget(self) -> None:
        self._ready = None


def _in_order(results: list[tuple[list[int], Trained]], clients: Tensor, images: Tensor) -> Trained:
    """What was trained in turns, each with the places of its clients, in the order of all clients."""
    places = torch.tensor([place for members, _ in results for place in members])
    back = places.argsort()
    first = results[0][1]

    def together(stacks: list[Stack]) -> Any:
        named = [stack.tensors() for stack in stacks]
        return stacks[0].like({name: torch.cat([one[name] for one in named])[back] for name in named[0]})

    trained = [one for _, one in results]
    return Trained(
        clients,
        {tier: together([one.tiers[tier] for one in trained]) for tier in first.tiers},
        together([one.head for one in trained]),
        None if first.composition is None else together([one.composition for one in trained if one.composition]),
        images,
        torch.cat([one.loss for one in trained])[back],
    )
