"""Many clients trained, or evaluated, in one forward pass of the backbone that they share."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import HiLoRAConfig
from ..inject import banks, inject, set_active_tier
from ..orthogonality import tier_penalties
from .backbone import Backbone
from .capacity import free_memory, out_of_memory, saved_bytes
from .data import ImageSet, augment, draw, prepare
from .optim import Slotted
from .placement import Placement, copied, overwrite, place, placement
from .settings import RunConfig
from .state import Models, State, Table, Trained, stream
from .training import LocalTraining

EVALUATION_ROWS = 512
IMAGES_AT_ONCE, IMAGES_ON_CUDA = 160, 1024  # in a step, where the size of cohorts is not given
ADAMW_COPIES = 6  # of a client's adapters: values, gradients, two moments, and what a step of AdamW makes in passing


class _Ready(NamedTuple):
    """A training that can be used again: with tensors of the same shapes, in the same places."""

    key: tuple[object, ...]
    tables: Placement
    head: State
    training: LocalTraining


class Cohort:
    """A frozen ViT whose batches hold G clients, each with its own adapters and head.

    The backbone is the same for all and does not change, so the gradients of the clients do not mix: a step is that of
    G separate trainings. Every client draws its batches from a random stream of its own; how the clients are cut into
    cohorts changes nothing but rounding.

    Args:
        backbone: the ViT; it gets adapters.
        tiers: names of the tiers that the clients' models can have.
        run: how to train.
        device: where to compute. Tables of adapters stay where the strategy keeps them.
        dtype: of the backbone; adapters, heads and losses are fp32.

    Attributes:
        room: how many clients are trained at once at most; None until the first of them are, if that is to be found.
        note: is told what a user should know.

    Raises:
        ValueError: if a rank exceeds the sides of an adapted projection: aggregates could not have it.
    """

    def __init__(
        self, backbone: Backbone, tiers: tuple[str, ...], run: RunConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.run, self.backbone, self.device, self.dtype = run, backbone, device, dtype
        self.mean, self.std = backbone.mean.to(device), backbone.std.to(device)  # a graph cannot fetch them
        self.room = run.cohort_size
        self.note: Callable[[str], object] = print
        self._ready: _Ready | None = None
        self.config = HiLoRAConfig(
            r={tier: run.rank[tier] for tier in tiers},
            lora_alpha={tier: run.lora_alpha[tier] for tier in tiers},
            target_modules=run.target_modules,
            lora_dropout=run.lora_dropout,
            tiers=tiers,
        )
        self.model = inject(copy.deepcopy(backbone.model).to(device, dtype), self.config)
        self.banks = banks(self.model)
        for bank in self.banks:
            for tier in tiers:
                if run.rank[tier] > min(bank.in_features, bank.out_features):
                    raise ValueError(
                        f"rank {run.rank[tier]} of tier {tier!r} exceeds the sides of the projections, "
                        f"{bank.in_features} → {bank.out_features}: choose a lower one"
                    )

    def fresh(self, tier: str, slots: int, generator: torch.Generator) -> State:
        """New adapters of a tier, `[slots, ...]`, without effect as yet."""
        state = {}
        for index, bank in enumerate(self.banks):
            A, B = bank.fresh(tier, slots, generator)
            state[f"A{index}"], state[f"B{index}"] = A.transpose(0, 1).contiguous(), B.transpose(0, 1).contiguous()
        return state

    def train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        tier: str,
        epochs: int,
        ids: Tensor,
        purpose: str,
        round: int = 0,
        rates: str | None = None,
    ) -> Trained:
        """Local training of n clients, one tier and the head of each.

        Args:
            images: of all clients.
            shares: for each of the n clients, the indices of its images, `[n_i]`; may be empty.
            models: what the clients start from.
            tier: to train; its adapters and the heads are copied for each client.
            epochs: passes over a client's images.
            ids: `[n]`, which clients these are, for their random streams.
            purpose: of the training, and `round`: likewise.
            rates: the tier whose learning rates to use; the one that is trained by default.
        """
        order = sorted(range(len(shares)), key=lambda i: -len(shares[i]))  # alike sizes together: fewer idle rows
        counts = torch.tensor([len(share) for share in shares])
        found = Trained({}, {}, counts * epochs, torch.full((len(shares),), torch.nan))

        def train(members: list[int], room: int) -> None:
            streams = [stream(self.run.seed, purpose, round, int(ids[i])) for i in members]
            # Without images, so that cohorts have one size, and a graph that was captured for one serves the next.
            idle = (room - len(members)) * (self.device.type == "cuda")
            own = [shares[i] for i in members] + [counts.new_empty(0)] * idle
            picked = models.rows(torch.tensor(members + members[:1] * idle))
            with torch.random.fork_rng():  # of the dropout's draws
                torch.manual_seed(streams[0].initial_seed())
                parts = self._train(images, own, picked, tier, epochs, streams, rates or tier)
            found.put(torch.tensor(members), *parts)

        self._in_cohorts(order, images, train)
        return found

    def _train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        tier: str,
        epochs: int,
        streams: list[torch.Generator],
        rates: str,
    ) -> tuple[State, State, Tensor]:
        """The adapters, the heads and the mean losses `[G]` of clients in one cohort, on its device."""
        batch = self.run.batch_size
        training, head = self._prepared(images, models, tier, rates)
        steps = -(-torch.tensor([len(share) for share in shares]) // batch)  # [G]
        training.begin(steps * epochs)
        for _ in range(epochs):
            pixels, labels = self._epoch(images, shares, streams)
            for step in range(int(steps.max())):
                rows = slice(step * batch, (step + 1) * batch)
                training.step(pixels[:, rows], labels[:, rows])
        adapters = {}
        for index, bank in enumerate(self.banks):
            adapters[f"A{index}"] = bank.A[tier].detach().transpose(0, 1)
            adapters[f"B{index}"] = bank.B[tier].detach().transpose(0, 1)
        head = {name: value.detach() for name, value in head.items()}
        return adapters, head, training.loss / (steps * epochs).to(training.loss)

    def _prepared(self, images: ImageSet, models: Models, tier: str, rates: str) -> tuple[LocalTraining, State]:
        """The training of a cohort and its heads, with the clients' values in place; the one before serves again where
        all shapes are the same."""
        values, head = placement(self.banks, models, own=tier), models.head.taken()
        shapes = [(A.shape, B.shape, slot is None) for placed in values.values() for A, B, slot in placed]
        key = tier, rates, str(shapes), len(models.head.slot), images.images.shape[1:]
        if self._ready is None or self._ready.key != key:
            self._ready = None  # its memory is free before more is taken
            self._ready = self._new_training(key, copied(values, self.device), head, images, tier, rates)
        ready = self._ready
        overwrite(ready.tables, values)
        place(self.banks, ready.tables)
        with torch.no_grad():
            for name, value in head.items():
                ready.head[name].copy_(value)
        set_active_tier(self.model, tier)
        self.model.train()
        return ready.training, ready.head

    def _new_training(
        self,
        key: tuple[object, ...],
        tables: Placement,
        head: State,
        images: ImageSet,
        tier: str,
        rates: str,
    ) -> _Ready:
        trains_head = self.run.head == "follow" or tier == self.config.tiers[0]
        heads = {name: value.to(self.device, copy=True).requires_grad_(trains_head) for name, value in head.items()}
        slotted = [
            Slotted(factor, 1, self.run.lr[rates]) for bank in self.banks for factor in (bank.A[tier], bank.B[tier])
        ]
        if trains_head:
            slotted += [Slotted(value, 0, self.run.head_lr[rates]) for value in heads.values()]
        clients = len(heads["weight"])
        pixels = torch.zeros(
            clients, self.run.batch_size, *images.images.shape[1:], dtype=torch.uint8, device=self.device
        )
        place(self.banks, tables)  # AdamW's moments have the shapes of what is in the banks
        training = LocalTraining(
            lambda pixels: self._logits(pixels, heads),
            lambda: tier_penalties(self.model, **self._gammas()),
            slotted,
            pixels,
            self.run.weight_decay,
            self.run.clip_norm,
            self.run.schedule,
        )
        return _Ready(key, tables, heads, training)

    def _gammas(self) -> dict[str, float]:
        given = {"root": self.run.gamma_root, "cluster": self.run.gamma_cluster}
        return {f"gamma_{tier}": given.get(tier, 0.0) for tier in self.config.tiers}

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

    def keep(self, adapters: dict[str, State]) -> None:
        """Put all adapters of all tiers into the banks, for saving; none of a tier that is not there."""
        none = Table({}, torch.empty(0, dtype=torch.long))
        tables = {tier: Table(state, torch.arange(len(state["A0"]))) for tier, state in adapters.items()}
        place(self.banks, copied(placement(self.banks, Models(tables, none)), self.device))

    def _logits(self, pixels: Tensor, head: State) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, classes]`."""
        features = self.model(self._pixels(pixels.flatten(0, 1).to(self.device))).to(head["weight"])
        return torch.baddbmm(head["bias"][:, None], features.view(*pixels.shape[:2], -1), head["weight"].mT)

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, h, w]` → what the backbone takes."""
        return prepare(images, self.backbone.size, self.mean, self.std, self.dtype)

    @torch.no_grad()
    def correct(self, images: ImageSet, shares: list[Tensor], models: Models) -> Tensor:
        """Share of right answers of n clients, each on its own images: `[n]`, NaN for a client without any."""
        found = torch.full((len(shares),), torch.nan)

        def count(members: list[int], room: int) -> None:
            own = [shares[i] for i in members]
            picked = models.rows(torch.tensor(members))
            place(self.banks, copied(placement(self.banks, picked), self.device))
            head = {name: value.to(self.device) for name, value in picked.head.taken().items()}
            self.model.eval()
            rows = max(1, EVALUATION_ROWS // len(own))
            right = torch.zeros(len(own), device=self.device)
            for first in range(0, max(len(share) for share in own), rows):
                chunks = [share[first : first + rows] for share in own]
                index = pad_sequence(chunks, batch_first=True, padding_value=-1)
                labels = torch.where(index >= 0, images.labels[index.clamp_min(0)], -1).to(self.device)
                pixels = images.images[index.clamp_min(0).to(images.images.device)]
                right += (self._logits(pixels, head).argmax(-1) == labels).sum(1)
            found[torch.tensor(members)] = right.cpu() / torch.tensor([len(share) for share in own])

        self._in_cohorts(list(range(len(shares))), images, count)
        return found

    def _in_cohorts(self, order: list[int], images: ImageSet, work: Callable[[list[int], int], None]) -> None:
        """Do the work for all clients, as many at once as there is room for: half as many where memory runs out."""
        if self.room is None:
            self.room = self._fitting(images)
        done = 0
        while done < len(order):
            cohorts = -(-len(order) // self.room)
            size = -(-len(order) // cohorts)  # all of one size, the last one perhaps smaller
            try:
                work(order[done : done + size], size)
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                self.room, self._ready = size // 2, None
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                self.note(f"out of memory with {size} clients at once, going on with {self.room}")
            else:
                done += size

    def _fitting(self, images: ImageSet) -> int:
        """As many clients as keep the device busy and fit into half of its free memory."""
        batch, rank = self.run.batch_size, max(self.run.rank.values())
        self.keep({})
        x = self._pixels(images.images[:1].to(self.device))
        activations = saved_bytes(lambda: self.model(x.requires_grad_()))
        elements = sum(len(bank.names) * rank * (bank.in_features + bank.out_features) for bank in self.banks)
        client = batch * activations + 4 * ADAMW_COPIES * elements
        wanted = (IMAGES_ON_CUDA if self.device.type == "cuda" else IMAGES_AT_ONCE) // batch
        return max(1, min(wanted, int(free_memory(self.device) / 2 / client)))
