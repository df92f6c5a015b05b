"""Many clients trained, or evaluated, in one forward pass of the backbone that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hilora.adapters.orthogonality import tier_penalties
from hilora.federated.data.images import ImageSet, augment, draw
from hilora.federated.engine.mixing import mix_tiers
from hilora.federated.engine.optim import Slotted
from hilora.federated.engine.placement import Placement, copied, overwrite, place, placement
from hilora.federated.engine.predictor import Predictor
from hilora.federated.engine.state import Models, State, Trained, stream
from hilora.federated.engine.training import BilevelTraining, LocalTraining
from hilora.federated.settings import RunConfig
from hilora.models.backbone import Backbone


class Lower(NamedTuple):
    """The lower level of a bilevel problem: a tier, trained by SGD with this learning rate."""

    tier: str
    lr: float


class Task(NamedTuple):
    """What clients train: a tier and the head.

    Attributes:
        tier: which one.
        epochs: passes over a client's images.
        rates: the tier whose learning rates to use; the same one by default.
        factors: which of the adapters' factors are trained: "AB", one of them, or "" for the head alone.
        lower: the problem has a lower level.
    """

    tier: str
    epochs: int = 1
    rates: str | None = None
    factors: str = "AB"
    lower: Lower | None = None


class _Ready(NamedTuple):
    """A training that can be used again: with tensors of the same shapes, in the same places."""

    key: tuple[object, ...]
    tables: Placement
    head: State
    training: LocalTraining


class Cohort(Predictor):
    """Trains the clients whose models a `Predictor` holds.

    The backbone is the same for all and does not change, so the gradients of the clients do not mix: a step is that of
    G separate trainings. Every client draws its batches from a random stream of its own; how the clients are cut into
    cohorts changes nothing but rounding.
    """

    def __init__(
        self, backbone: Backbone, tiers: tuple[str, ...], run: RunConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(backbone, tiers, run, device, dtype)
        self._ready: _Ready | None = None

    def train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        task: Task,
        ids: Tensor,
        purpose: str,
        round: int = 0,
    ) -> Trained:
        """Local training of n clients, one tier and the head of each.

        Args:
            images: of all clients.
            shares: for each of the n clients, the indices of its images, `[n_i]`; may be empty.
            models: what the clients start from.
            task: what they train.
            ids: `[n]`, which clients these are, for their random streams.
            purpose: of the training, and `round`: likewise.
        """
        order = sorted(range(len(shares)), key=lambda i: -len(shares[i]))  # alike sizes together: fewer idle rows
        counts = torch.tensor([len(share) for share in shares])
        found = Trained({}, {}, counts * task.epochs, torch.full((len(shares),), torch.nan), {})

        def train(members: list[int], room: int) -> None:
            streams = [stream(self.run.seed, purpose, round, int(ids[i])) for i in members]
            # Without images, so that cohorts have one size, and a graph that was captured for one serves the next.
            idle = (room - len(members)) * (self.device.type == "cuda")
            own = [shares[i] for i in members] + [counts.new_empty(0)] * idle
            picked = models.rows(torch.tensor(members + members[:1] * idle))
            with torch.random.fork_rng():  # of the dropout's draws
                torch.manual_seed(streams[0].initial_seed())
                states, loss = self._train(images, own, picked, task, streams)
            found.put(torch.tensor(members), states, loss)

        self._in_cohorts(order, images, train)
        return found

    def _train(
        self, images: ImageSet, shares: list[Tensor], models: Models, task: Task, streams: list[torch.Generator]
    ) -> tuple[tuple[State, State, State], Tensor]:
        """The adapters, the heads, the adapters of the lower level and the mean losses `[G]` of clients in one cohort,
        on its device."""
        batch = self.run.batch_size
        ready = self._prepared(images, models, task)
        training = ready.training
        steps = -(-torch.tensor([len(share) for share in shares]) // batch)  # [G]
        training.begin(steps * task.epochs)
        for _ in range(task.epochs):
            pixels, labels = self._epoch(images, shares, streams)
            for step in range(int(steps.max())):
                rows = slice(step * batch, (step + 1) * batch)
                training.step(pixels[:, rows], labels[:, rows])
        head = {name: value.detach() for name, value in ready.head.items()}
        lower = self._held(task.lower.tier, ready.tables) if task.lower is not None else {}
        return (self._held(task.tier, ready.tables), head, lower), training.loss / (steps * task.epochs).to(
            training.loss
        )

    def _held(self, tier: str, tables: Placement) -> State:
        """The adapters that the banks hold of a tier, `[G, ...]`."""
        state = {}
        for index, (bank, placed) in enumerate(zip(self.banks, tables[tier], strict=True)):
            state[f"A{index}"] = bank.A(tier).detach().transpose(0, 1)
            state[f"B{index}"] = bank.B(tier).detach().transpose(0, 1)
            if placed.gate is not None:
                state[f"gate{index}"] = placed.gate.detach().transpose(0, 1)
        return state

    def _prepared(self, images: ImageSet, models: Models, task: Task) -> _Ready:
        """The training of a cohort, with the clients' values in place; the one before serves again where all shapes
        are the same."""
        own = {task.tier} if task.lower is None else {task.tier, task.lower.tier}
        values, head = placement(self.banks, models, own), models.head.taken()
        shapes = [(one.A.shape, one.B.shape, one.slot is None) for placed in values.values() for one in placed]
        mix = None if models.mix is None else models.mix._replace(references=None)
        key = task._replace(epochs=0), mix, str(shapes), len(models.head.slot), images.images.shape[1:]
        if self._ready is None or self._ready.key != key:
            self._ready = None  # its memory is free before more is taken
            self._ready = self._new_training(key, copied(values, self.device), head, images, task)
        ready = self._ready
        overwrite(ready.tables, values)
        place(self.banks, ready.tables)
        mix_tiers(self.banks, models.mix, ready.tables)
        with torch.no_grad():
            for name, value in head.items():
                ready.head[name].copy_(value)
        self._activate(task)
        self.model.train()
        return ready

    def _activate(self, task: Task) -> None:
        """Let what is trained require gradients, and nothing else."""
        for bank in self.banks:
            for tier in bank.tiers:
                lower = task.lower is not None and tier == task.lower.tier
                bank.A(tier).requires_grad_(lower or (tier == task.tier and "A" in task.factors))
                bank.B(tier).requires_grad_(lower or (tier == task.tier and "B" in task.factors))

    def _new_training(
        self, key: tuple[object, ...], tables: Placement, head: State, images: ImageSet, task: Task
    ) -> _Ready:
        run, rates = self.run, task.rates or task.tier
        trains_head = run.head == "follow" or task.tier == self.config.tiers[0]
        heads = {name: value.to(self.device, copy=True).requires_grad_(trains_head) for name, value in head.items()}
        gates = [placed.gate.requires_grad_() for placed in tables[task.tier] if placed.gate is not None]
        clients, lower = len(heads["weight"]), task.lower
        pixels = torch.zeros(clients, run.batch_size, *images.images.shape[1:], dtype=torch.uint8, device=self.device)
        place(self.banks, tables)  # AdamW's moments have the shapes of what is in the banks

        def of_adapters(tier: str, factors: str, lr: float) -> list[Slotted]:
            return [Slotted(getattr(bank, factor)(tier), 1, lr) for bank in self.banks for factor in factors]

        def predict(pixels: Tensor) -> Tensor:
            return self._logits(pixels, heads)

        trained = of_adapters(task.tier, task.factors, run.lr[rates]) + [Slotted(g, 1, run.lr[rates]) for g in gates]
        if trains_head:
            trained += [Slotted(value, 0, run.head_lr[rates]) for value in heads.values()]
        how = (pixels, run.weight_decay, run.clip_norm, run.schedule)
        if lower is None:
            return _Ready(key, tables, heads, LocalTraining(predict, self._penalty, trained, *how))
        below = of_adapters(lower.tier, "AB", lower.lr)

        def predict_with(pixels: Tensor, values: Sequence[Tensor]) -> Tensor:
            own = [bank.held[lower.tier] for bank in self.banks]
            for bank, A, B in zip(self.banks, values[::2], values[1::2], strict=True):
                bank.hold(lower.tier, A, B, bank.slots[lower.tier])
            logits = self._logits(pixels, heads)
            for bank, (A, B) in zip(self.banks, own, strict=True):
                bank.hold(lower.tier, A, B, bank.slots[lower.tier])
            return logits

        return _Ready(key, tables, heads, BilevelTraining(predict, predict_with, trained, below, *how))

    def _penalty(self) -> Tensor:
        """Of each client's adapters, `[G]`, or 0 for all where nothing weighs it."""
        given = {"root": self.run.gamma_root, "cluster": self.run.gamma_cluster}
        gammas = {f"gamma_{tier}": given.get(tier, 0.0) for tier in self.config.tiers}
        return tier_penalties(self.model, **gammas) if any(gammas.values()) else torch.zeros((), device=self.device)

    def _epoch(self, images: ImageSet, shares: list[Tensor], streams: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The clients' images in this epoch's order: uint8 `[G, rows, 3, h, w]`, labels `[G, rows]` padded with -1."""
        batch = self.run.batch_size
        rows = max(-(-len(share) // batch) * batch for share in shares)
        index = torch.full((len(shares), rows), -1)
        draws = torch.zeros(len(shares), rows, 3, dtype=torch.long)
        height, width = images.images.shape[2:]
        for client, (share, generator) in enumerate(zip(shares, streams, strict=False)):  # idle ones have no stream
            index[client, : len(share)] = share[torch.randperm(len(share), generator=generator)]
            if self.run.augment:
                draws[client, : len(share)] = draw(len(share), height, width, generator, images.mirrors)
        labels = torch.where(index >= 0, images.labels[index.clamp_min(0)], -1)
        pixels = images.images[index.clamp_min(0).to(images.images.device)]
        if self.run.augment:
            pixels = augment(pixels.flatten(0, 1), draws.flatten(0, 1)).view(pixels.shape)
        return pixels, labels.to(self.device)

    def _forget(self) -> None:
        self._ready = None
