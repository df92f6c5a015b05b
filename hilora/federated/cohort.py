"""Many clients trained, or evaluated, in one forward pass of the backbone that they share."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..config import HiLoRAConfig
from ..inject import banks, inject, set_active_tier
from ..orthogonality import tier_penalties
from .backbone import Backbone
from .data import ImageSet, augment, prepare
from .optim import SlotAdamW, Slotted
from .settings import RunConfig
from .state import Models, State, Table, Trained, join, stream

EVALUATION_ROWS = 512


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

    Raises:
        ValueError: if a rank exceeds the sides of an adapted projection: aggregates could not have it.
    """

    def __init__(
        self, backbone: Backbone, tiers: tuple[str, ...], run: RunConfig, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.run, self.backbone, self.device, self.dtype = run, backbone, device, dtype
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
        parts = []
        for start in range(0, len(order), self.run.cohort_size):
            members = order[start : start + self.run.cohort_size]
            picked = models.rows(torch.tensor(members))
            streams = [stream(self.run.seed, purpose, round, int(ids[i])) for i in members]
            with torch.random.fork_rng():  # of the dropout's draws
                torch.manual_seed(streams[0].initial_seed())
                parts.append(
                    self._train(images, [shares[i] for i in members], picked, tier, epochs, streams, rates or tier)
                )
        return join(parts).rows(torch.tensor(order).argsort())

    def _train(
        self,
        images: ImageSet,
        shares: list[Tensor],
        models: Models,
        tier: str,
        epochs: int,
        streams: list[torch.Generator],
        rates: str,
    ) -> Trained:
        clients, batch = len(shares), self.run.batch_size
        counts = torch.tensor([len(share) for share in shares])
        head = self._load(models, own=tier)
        set_active_tier(self.model, tier)
        self.model.train()
        trained = [parameter for bank in self.banks for parameter in (bank.A[tier], bank.B[tier])]
        trains_head = self.run.head == "follow" or tier == self.config.tiers[0]
        slotted = [Slotted(parameter, 1, self.run.lr[rates]) for parameter in trained]
        if trains_head:
            slotted += [Slotted(value, 0, self.run.head_lr[rates]) for value in head.values()]
        for value in head.values():
            value.requires_grad_(trains_head)
        optimiser = SlotAdamW(slotted, clients, self.run.weight_decay)
        steps = -(-counts // batch)  # [G]
        loss_sum = torch.zeros(clients, device=self.device)
        for _ in range(epochs):
            pixels, labels = self._epoch(images, shares, streams)
            for step in range(int(steps.max())):
                rows = slice(step * batch, (step + 1) * batch)
                target = labels[:, rows].to(self.device)  # [G, b], -1 where a client has no more images
                logits = self._logits(pixels[:, rows], head)
                losses = F.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=-1, reduction="none")
                valid = (target >= 0).sum(1)  # [G]
                task = losses.view(clients, -1).sum(1) / valid.clamp_min(1)  # [G]
                penalty = tier_penalties(self.model, **self._gammas())
                gradients = torch.autograd.grad((task + penalty).sum(), [slot.parameter for slot in slotted])
                optimiser.step(list(gradients), valid > 0)
                loss_sum += task.detach() * (valid > 0)
        adapters = {}
        for index, bank in enumerate(self.banks):
            adapters[f"A{index}"] = bank.A[tier].detach().transpose(0, 1).cpu()
            adapters[f"B{index}"] = bank.B[tier].detach().transpose(0, 1).cpu()
        loss = loss_sum.cpu() / (steps * epochs)
        return Trained(adapters, {name: value.detach().cpu() for name, value in head.items()}, counts * epochs, loss)

    def _gammas(self) -> dict[str, float]:
        given = {"root": self.run.gamma_root, "cluster": self.run.gamma_cluster}
        return {f"gamma_{tier}": given.get(tier, 0.0) for tier in self.config.tiers}

    def _epoch(self, images: ImageSet, shares: list[Tensor], streams: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """The clients' images in this epoch's order: uint8 `[G, rows, 3, h, w]`, labels `[G, rows]` padded with -1."""
        batch = self.run.batch_size
        rows = max(-(-len(share) // batch) * batch for share in shares)
        pixels = images.images.new_zeros(len(shares), rows, *images.images.shape[1:])
        labels = torch.full((len(shares), rows), -1)
        for client, (share, generator) in enumerate(zip(shares, streams, strict=True)):
            mixed = share[torch.randperm(len(share), generator=generator)]
            own = images.images[mixed.to(images.images.device)]
            if self.run.augment and len(own):
                own = augment(own, generator, images.mirrors)
            pixels[client, : len(mixed)], labels[client, : len(mixed)] = own, images.labels[mixed]
        return pixels, labels

    def _load(self, models: Models, own: str | None = None) -> State:
        """Put the clients' adapters into the banks; returns their heads `[G, ...]`. The tier `own` is copied, so that
        each client has its own adapter of it."""
        for tier in self.config.tiers:
            table = models.tiers.get(tier)
            for index, bank in enumerate(self.banks):
                if table is None:
                    A, B = bank.A[tier].data[:, :0], bank.B[tier].data[:, :0]
                    slot = None
                else:
                    state = table.taken() if tier == own else table.state
                    A, B = (state[f"{factor}{index}"].transpose(0, 1).to(self.device) for factor in "AB")
                    slot = torch.arange(len(table.slot)) if tier == own else table.slot
                bank.assign(tier, A.contiguous(), B.contiguous())
                bank.slots[tier] = None if slot is None else slot.to(self.device, torch.int32)
        return {name: value.to(self.device) for name, value in models.head.taken().items()}

    def keep(self, adapters: dict[str, State]) -> None:
        """Put all adapters of all tiers into the banks, for saving."""
        none = Table({}, torch.empty(0, dtype=torch.long))
        tables = {tier: Table(state, torch.arange(1)) for tier, state in adapters.items()}
        self._load(Models(tables, none))

    def _logits(self, pixels: Tensor, head: State) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, classes]`."""
        clients = len(pixels)
        x = prepare(
            pixels.flatten(0, 1).to(self.device), self.backbone.size, self.backbone.mean, self.backbone.std, self.dtype
        )
        features = self.model(x).to(head["weight"]).view(clients, -1, self.backbone.features)
        return torch.baddbmm(head["bias"][:, None], features, head["weight"].mT)

    @torch.no_grad()
    def correct(self, images: ImageSet, shares: list[Tensor], models: Models) -> Tensor:
        """Share of right answers of n clients, each on its own images: `[n]`, NaN for a client without any."""
        self.model.eval()
        found = []
        for start in range(0, len(shares), self.run.cohort_size):
            members = slice(start, start + self.run.cohort_size)
            head = self._load(models.rows(torch.arange(len(shares))[members]))
            own = shares[members]
            rows = max(1, EVALUATION_ROWS // len(own))
            right = torch.zeros(len(own))
            for first in range(0, max(len(share) for share in own), rows):
                chunks = [share[first : first + rows] for share in own]
                index = pad_sequence(chunks, batch_first=True, padding_value=-1)
                pixels = images.images[index.clamp_min(0).to(images.images.device)]
                guesses = self._logits(pixels, head).argmax(-1).cpu()
                right += ((guesses == images.labels[index.clamp_min(0)]) & (index >= 0)).sum(1)
            found.append(right / torch.tensor([len(share) for share in own]))
        return torch.cat(found)
