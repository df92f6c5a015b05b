"""Many clients' models in one ViT: what they predict, as many at once as there is room for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.injection import banks, inject
from hilora.federated.data.images import ImageSet, prepare
from hilora.federated.engine.device import free_memory, out_of_memory, saved_bytes
from hilora.federated.engine.mixing import mix_tiers, nearness
from hilora.federated.engine.placement import Placement, copied, place, placement
from hilora.federated.engine.state import Mix, Models, State, Table
from hilora.federated.settings import RunConfig
from hilora.models.backbone import Backbone

EVALUATION_ROWS = 512
IMAGES_AT_ONCE, IMAGES_ON_CUDA = 160, 1024  # in a step, where the size of cohorts is not given
ADAMW_COPIES = 6  # of a client's adapters: values, gradients, two moments, and what a step of AdamW makes in passing


class Scores(NamedTuple):
    """How n clients predict, `[n]`; NaN for one without images."""

    correct: Tensor  # share of right answers
    loss: Tensor  # mean cross entropy


class Predictor:
    """A frozen ViT whose batches hold G clients, each with its own adapters and head.

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

    def keep(self, adapters: dict[str, State]) -> None:
        """Put all adapters of all tiers into the banks, for saving; none of a tier that is not there."""
        none = Table({}, torch.empty(0, dtype=torch.long))
        tables = {tier: Table(state, torch.arange(len(state["A0"]))) for tier, state in adapters.items()}
        for tier, placed in placement(self.banks, Models(tables, none)).items():
            for bank, one in zip(self.banks, placed, strict=True):
                bank.release()
                bank.assign(tier, one.A, one.B)

    def _logits(self, pixels: Tensor, head: State) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, classes]`."""
        features = self._features(pixels).to(head["weight"])
        return torch.baddbmm(head["bias"][:, None], features, head["weight"].mT)

    def _features(self, pixels: Tensor) -> Tensor:
        """uint8 `[G, b, 3, h, w]` → `[G, b, D]`."""
        x = self._pixels(pixels.flatten(0, 1).to(self.device))
        y: Tensor = self.model(x)
        return y.view(*pixels.shape[:2], -1)

    def _pixels(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, h, w]` → what the backbone takes."""
        return prepare(images, self.backbone.size, self.mean, self.std, self.dtype)

    @torch.no_grad()
    def evaluate(
        self, images: ImageSet, shares: list[Tensor], models: Models, training: ImageSet | None = None
    ) -> Scores:
        """How n clients predict their own images.

        Args:
            images: of all clients.
            shares: for each of the n clients, the indices of its images, `[n_i]`; may be empty.
            models: what they predict with.
            training: the images that a mix's references are among; `images` themselves by default.
        """
        found = Scores(*(torch.full((len(shares),), torch.nan) for _ in Scores._fields))

        def score(members: list[int], room: int) -> None:
            own = [shares[i] for i in members]
            picked = models.rows(torch.tensor(members))
            tables = copied(placement(self.banks, picked), self.device)
            place(self.banks, tables)
            head = {name: value.to(self.device) for name, value in picked.head.taken().items()}
            self.model.eval()
            weigh = self._weigher(picked.mix, tables, training or images)
            rows = max(1, EVALUATION_ROWS // len(own))
            right, loss = (torch.zeros(len(own), device=self.device) for _ in range(2))
            for first in range(0, max(len(share) for share in own), rows):
                chunks = [share[first : first + rows] for share in own]
                index = pad_sequence(chunks, batch_first=True, padding_value=-1)
                labels = torch.where(index >= 0, images.labels[index.clamp_min(0)], -1).to(self.device)
                pixels = images.images[index.clamp_min(0).to(images.images.device)]
                weigh(pixels)
                logits = self._logits(pixels, head)
                right += (logits.argmax(-1) == labels).sum(1)
                loss += F.cross_entropy(logits.mT, labels, ignore_index=-1, reduction="none").sum(1)
            counts = torch.tensor([len(share) for share in own])
            found.correct[torch.tensor(members)] = right.cpu() / counts
            found.loss[torch.tensor(members)] = loss.cpu() / counts

        self._in_cohorts(list(range(len(shares))), images, score)
        return found

    def _weigher(self, mix: Mix | None, tables: Placement, training: ImageSet) -> Callable[[Tensor], None]:
        """What sets how the tiers are weighed for the images that it is given, uint8 `[G, b, 3, h, w]`."""
        mix_tiers(self.banks, mix, tables)
        if mix is None or mix.references is None:
            return lambda pixels: None
        mix_tiers(self.banks, mix, tables, share=1.0)
        references = self._features(training.images[mix.references.to(training.images.device)])  # [G, m, D]

        def weigh(pixels: Tensor) -> None:
            mix_tiers(self.banks, mix, tables, share=1.0)
            near = nearness(self._features(pixels), references)
            share = mix.share.to(near).unsqueeze(-1) if isinstance(mix.share, Tensor) else mix.share
            mix_tiers(self.banks, mix, tables, share=share * near)

        return weigh

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
                self.room = size // 2
                self._forget()
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

    def _forget(self) -> None:
        """Give back memory that is held only to be used again."""
