"""Many clients' models in one ViT: what they predict, as many at once as there is room for."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hilora.adapters.composition import Composition
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import banks, inject
from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.client import Models
from hilora.federated.data.images import ImageSet, prepare
from hilora.federated.engine.blocks import Blocks
from hilora.federated.engine.device import free_memory, out_of_memory, saved_bytes
from hilora.federated.engine.placement import Placement, arranged
from hilora.federated.protocol import Head, Rows
from hilora.federated.settings import TrainingSettings
from hilora.models.backbone import Backbone
from hilora.models.quick import hasten

log = logging.getLogger(__name__)
EVALUATION_ROWS = 512
IMAGES_AT_ONCE, IMAGES_ON_CUDA = 160, 1024  # in a step, where the number of clients at once is not given
ADAMW_COPIES = 6  # of a client's adapters: values, gradients, two moments, and what a step of AdamW makes in passing


class Scores(NamedTuple):
    """How n clients predict, `[n]`; NaN for one without images."""

    correct: Tensor  # share of right answers
    loss: Tensor  # mean cross entropy


class Predictor:
    """A frozen ViT whose batches hold G clients, each with its own adapters and head.

    Args:
        backbone: the ViT; it gets adapters.
        config: the adapters that the clients' models can have.
        settings: how to train.
        device: where to compute. Tables of adapters stay where the strategy keeps them.
        dtype: of the backbone; adapters, heads and losses are fp32.

    Attributes:
        blocks: of the model; which of them the clients have is said in training alone.
        room: how many clients are trained at once at most; None until the first of them are, if that is to be found.

    Raises:
        InvalidValueError: if a rank exceeds the sides of an adapted projection: aggregates could not have it.
    """

    def __init__(
        self,
        backbone: Backbone,
        config: HiLoRAConfig,
        settings: TrainingSettings,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.backbone, self.device, self.dtype = settings, backbone, device, dtype
        self.mean, self.std = backbone.mean.to(device), backbone.std.to(device)  # a graph cannot fetch them
        self.room, self.config = settings.clients_at_once, config
        self.model = inject(copy.deepcopy(backbone.model).to(device, dtype), config)
        hasten(self.model)
        self.banks = banks(self.model)
        self.blocks = Blocks(self.model, self.banks)
        for bank in self.banks:
            for tier in config.tiers:
                if config.rank(tier) > min(bank.in_features, bank.out_features):
                    raise InvalidValueError(
                        f"rank {config.rank(tier)} of tier {tier!r} exceeds the sides of the projections, "
                        f"{bank.in_features} → {bank.out_features}: choose a lower one"
                    )

    def fresh(self, tier: str, slots: int, generator: torch.Generator, rows: Tensor | None = None) -> AdapterTable:
        """New adapters of a tier, `[slots, ...]`, without effect as yet; or the `rows` `[n]` of them alone."""
        pairs = [bank.fresh(tier, slots, generator, rows) for bank in self.banks]
        A, B = ([factor.transpose(0, 1).contiguous() for factor in factors] for factors in zip(*pairs, strict=True))
        return AdapterTable(A, B)

    def keep(self, tables: Mapping[str, AdapterTable]) -> None:
        """Let the model have these adapters of all clients, for saving; none of a tier that is not there."""
        rows = {tier: Rows(table, torch.arange(len(table))) for tier, table in tables.items()}
        for tier, found in arranged(self.banks, rows).items():
            table = found.table.with_scale_in_B()
            for bank, (A, B) in zip(self.banks, table.factors, strict=True):
                bank.assign(tier, A.transpose(0, 1), B.transpose(0, 1), table.rank)

    def _logits(self, pixels: Tensor, head: Head) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, classes]`."""
        features = self._features(pixels).to(head.weight)
        return torch.baddbmm(head.bias[:, None], features, head.weight.mT)

    def _features(self, pixels: Tensor) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, D]`."""
        y: Tensor = self.model(self._prepared_pixels(pixels.flatten(0, 1).to(self.device)))
        return y.view(*pixels.shape[:2], -1)

    def _prepared_pixels(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, h, w]` → what the backbone takes."""
        return prepare(images, self.backbone.size, self.mean, self.std, self.dtype)

    def _compose(self, composition: Composition | None) -> None:
        """Let the layers combine their tiers so."""
        for index, bank in enumerate(self.banks):
            bank.composition = None if composition is None else composition.gains(index)

    @torch.no_grad()
    def evaluate(
        self, images: ImageSet, shares: list[Tensor], models: Models, training: ImageSet | None = None
    ) -> Scores:
        """How n clients predict their own images.

        Args:
            images: of all clients.
            shares: for each of the n clients, the indices of its images, `[n_i]`; may be empty.
            models: what they predict with.
            training: the clients' training images, at which a composition may look; `images` themselves by default.
        """
        found = Scores(*(torch.full((len(shares),), torch.nan) for _ in Scores._fields))

        def score(members: list[int], room: int) -> None:
            own = [shares[i] for i in members]
            picked = models.of(torch.tensor(members))
            Placement(self.banks, arranged(self.banks, picked.tiers), self.device).hold()
            head = picked.head.taken().to(self.device)
            self.model.eval()
            self.blocks.gate = None
            composed = self._seeing(picked.composition, training or images)
            rows = max(1, EVALUATION_ROWS // len(own))
            right, loss = (torch.zeros(len(own), device=self.device) for _ in range(2))
            for first in range(0, max(len(share) for share in own), rows):
                chunks = [share[first : first + rows] for share in own]
                index = pad_sequence(chunks, batch_first=True, padding_value=-1)
                labels = torch.where(index >= 0, images.labels[index.clamp_min(0)], -1).to(self.device)
                pixels = images.images[index.clamp_min(0).to(images.images.device)]
                self._compose(composed(pixels))
                logits = self._logits(pixels, head)
                right += (logits.argmax(-1) == labels).sum(1)
                loss += F.cross_entropy(logits.mT, labels, ignore_index=-1, reduction="none").sum(1)
            counts = torch.tensor([len(share) for share in own])
            found.correct[torch.tensor(members)] = right.cpu() / counts
            found.loss[torch.tensor(members)] = loss.cpu() / counts

        self._in_turns(list(range(len(shares))), images, score)
        return found

    def _seeing(self, composition: Composition | None, training: ImageSet) -> Callable[[Tensor], Composition | None]:
        """What says how the tiers are combined for the images that it is given, uint8 `[G, b, 3, h, w]`."""
        if composition is None:
            return lambda pixels: None
        return composition.to(self.device).seeing(_Sight(self, training))

    def _in_turns(self, order: list[int], images: ImageSet, work: Callable[[list[int], int], None]) -> None:
        """Do the work for all clients, as many at once as there is room for: half as many where memory runs out."""
        if self.room is None:
            self.room = self._fitting(images)
        done = 0
        while done < len(order):
            turns = -(-len(order) // self.room)
            size = -(-len(order) // turns)  # all of one size, the last one perhaps smaller
            try:
                work(order[done : done + size], size)
            except RuntimeError as error:
                if not out_of_memory(error) or size == 1:
                    raise
                self.room = size // 2
                self._forget()
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                log.warning("out of memory with %d clients at once, going on with %d", size, self.room)
            else:
                done += size

    def _fitting(self, images: ImageSet) -> int:
        """As many clients as keep the device busy and fit into half of its free memory."""
        batch = self.settings.batch_size
        rank = max(self.config.rank(tier) for tier in self.config.tiers)
        Placement(self.banks, arranged(self.banks, {}), self.device).hold()
        self._compose(None)
        self.blocks.gate = None
        x = self._prepared_pixels(images.images[:1].to(self.device))
        activations = saved_bytes(lambda: self.model(x.requires_grad_()))
        elements = sum(len(bank.names) * rank * (bank.in_features + bank.out_features) for bank in self.banks)
        client = batch * activations + 4 * ADAMW_COPIES * elements
        wanted = (IMAGES_ON_CUDA if self.device.type == "cuda" else IMAGES_AT_ONCE) // batch
        return max(1, min(wanted, int(free_memory(self.device) / 2 / client)))

    def _forget(self) -> None:
        """Give back memory that is held only to be used again."""


class _Sight(NamedTuple):
    """What a composition can look at (`composition.Sight`)."""

    predictor: Predictor
    training: ImageSet

    def features(self, pixels: Tensor, composition: Composition) -> Tensor:
        self.predictor._compose(composition)
        return self.predictor._features(pixels)

    def training_images(self, index: Tensor) -> Tensor:
        return self.training.images[index.to(self.training.images.device)]
