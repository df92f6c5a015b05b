"""FedLEASE (Wang et al., Adaptive LoRA Experts Allocation and Selection for Federated Fine-Tuning, NeurIPS 2025): an
expert adapter for each group of clients, and a router with which a client uses as many of them as it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from hilora.adapters.composition import Composition, Gains
from hilora.adapters.config import HiLoRAConfig
from hilora.adapters.table import AdapterTable, Values
from hilora.algorithms.trees import Tree, cosine_distances
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Rows, Stage, Upload
from hilora.federated.settings import TrainingSettings, Whole
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.strategies.warm_up import WARM, WarmedUp, spread_out
from hilora.federated.streams import stream


class FedLEASE(WarmedUp):
    """After a warm-up clients are grouped by the mean of `1 − cos(B_i, B_j)` over projections: agglomerative clustering
    with average linkage, the number of groups M of the largest silhouette. Each group has an expert, which starts as
    the mean of what its members trained alone, factor by factor, and is averaged over them after each round.

    A client has all experts, and trains that of its own group, its router and its head. In every projection the router
    gives each token 2M − 1 logits `W x`: one for each expert and M − 1 more for its own one again. Of their softmax the
    M largest count, and are made to sum to one. So between one expert and all M of them are in use:

        y = W0 x + Σ_k w_k(x) B_e(k) A_e(k) x        k the M largest, e(k) the expert of place k

    As in the authors' code, which average linkage and the router's start (as of `nn.Linear`, without a bias) are from.
    Ours, for ViTs: the head is private, unless `shared_head` says otherwise. Routers are private as well; the code
    averages them inside of a group, but messages here carry adapters and heads. Means weigh clients by images. One
    expert serves all where fewer than three clients can be compared. The warm-up lasts for the rounds of the root tier.
    An unseen client joins the group whose members' B are nearest on average.
    """

    class Settings(SharableHead.Settings):
        experts: Whole = Field(4, ge=1, description="highest number of experts")

    name = "fedlease"
    tiers = ("cluster",)
    settings: Settings

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        tiers = ("cluster", *others(self.settings.experts))
        r, alpha = training.rank["cluster"], training.lora_alpha["cluster"]
        return replace(super().adapters(training), r=r, lora_alpha=alpha, tiers=tiers)

    def start(self) -> None:
        super().start()
        self.experts: AdapterTable | None = None
        self.member = torch.zeros(self.problem.clients, dtype=torch.long)
        self.known = torch.empty(0, dtype=torch.long)

    @property
    def formed(self) -> bool:
        return self.experts is not None

    def form(self, upload: Upload) -> None:
        self.known, self.warm = upload.clients, upload.tiers["cluster"].only("B")
        most = min(self.settings.experts, len(upload.clients) - 1)
        labels, count = torch.zeros(len(upload.clients), dtype=torch.long), 1
        if most > 1:
            distances = cosine_distances(self.warm.B).mean(0)
            labels, count, _ = Tree(distances).best(range(2, most + 1), distances)
        self.member = spread_out(labels, upload.clients, self.problem.clients)
        self.experts = self._averaged(upload, self.first().repeated(count))

    def place(self, clients: Tensor, table: AdapterTable) -> None:
        assert self.experts is not None
        both = [torch.cat([known, new]) for known, new in zip(self.warm.B, table.B, strict=True)]
        distances = cosine_distances(both).mean(0)[len(self.known) :, : len(self.known)]
        groups = self.member[self.known] == torch.arange(len(self.experts))[:, None]  # [M, N]
        mean = distances @ groups.double().T / groups.sum(1)
        self.member[clients] = mean.argmin(1)

    def adapters_for(self, stage: Stage, clients: Tensor) -> Download:
        assert self.experts is not None
        member, count = self.member[clients], len(self.experts)
        tiers = {"cluster": Rows(self.experts, member)}
        for step, tier in enumerate(others(count), 1):
            tiers[tier] = Rows(self.experts, (member + step) % count)
        return Download(stage, tiers)

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.task == WARM or self.experts is None:
            return {}
        self.average_heads(upload)
        self.experts = self._averaged(upload, self.experts)
        return {}

    def _averaged(self, upload: Upload, before: AdapterTable) -> AdapterTable:
        """The experts as the means of their groups; that of a group of which nobody had images stays."""
        experts, member = before.each(Tensor.clone), self.member[upload.clients]
        for group in member.unique():
            members = upload.rows(member == group)
            if members.images.sum() > 0:
                mean = self.averaging.mean(members.tiers["cluster"], members.images, before.rows(group[None]))
                experts.put(group[None], mean)
        return experts

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        done = self.alone(state, download, trainer)
        if done is not None:
            return done
        trained = trainer.train(self.models(state, download, trainer), "cluster", rates=download.stage.rates)
        if trained.composition is not None:
            state.put("router", Values(**trained.composition.tensors()))
        self.keep_heads(state, trained)
        return trained.upload("cluster", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        if download.stage.task == WARM:
            return self.by_itself(state)
        experts, tiers = download.tiers["cluster"], tuple(download.tiers)
        router = None
        if len(tiers) > 1:
            weights = state.filled("router", lambda: self.first_routers(state.clients, experts.table, len(tiers)))
            router = Router(tiers, list(weights.taken().tensors().values()))
        return Models(download.tiers, self.heads(state, download), router, experts.slot)

    def first_routers(self, clients: Tensor, table: AdapterTable, experts: int) -> Values:
        """The routers that clients begin with, `[n, P, 2M − 1, in]` for every shape of projection."""
        generator, drawn = stream(self.training.seed, "fresh routers"), {}
        for index, A in enumerate(table.A):
            _, projections, _, width = A.shape
            weight = torch.empty(self.problem.clients, projections, 2 * experts - 1, width)
            drawn[f"router.{index}"] = weight.uniform_(-(width**-0.5), width**-0.5, generator=generator).to(A)[clients]
        return Values(**drawn)


def others(experts: int) -> tuple[str, ...]:
    """The tiers of a client's other experts, in the order in which they follow its own."""
    return tuple(f"other{step}" for step in range(1, experts))


class Router(Composition):
    """Of 2M − 1 places for M tiers, the first one's M times, each token uses the M of the largest softmax.

    Args:
        tiers: the M tiers, a client's own expert first.
        weight: for every shape of projection, `[n, P, 2M − 1, in]`: rows 0 to M − 1 are those of the tiers in their
            order, the others those of the first tier again.
    """

    trained = True

    def __init__(self, tiers: Sequence[str], weight: Sequence[Tensor]) -> None:
        self.tiers, self.weight = tuple(tiers), tuple(weight)

    def tensors(self) -> dict[str, Tensor]:
        return {f"router.{index}": weight for index, weight in enumerate(self.weight)}

    def like(self, tensors: dict[str, Tensor]) -> Router:
        return Router(self.tiers, list(tensors.values()))

    def gains(self, bank: int) -> Gains:
        weight, count = self.weight[bank].transpose(0, 1), len(self.tiers)  # [P, G, 2M − 1, in]

        def weigh(position: int, x: Tensor) -> Mapping[str, float | Tensor]:
            logits = x @ weight[position].to(x.dtype).mT
            shares = torch.softmax(logits.to(torch.promote_types(x.dtype, torch.float32)), -1)  # [G, M, 2M − 1]
            chosen = shares.topk(count, -1)
            used = torch.zeros_like(shares).scatter(-1, chosen.indices, chosen.values)
            used = used / chosen.values.sum(-1, keepdim=True)
            gains = {tier: used[..., place] for place, tier in enumerate(self.tiers)}
            gains[self.tiers[0]] = gains[self.tiers[0]] + used[..., count:].sum(-1)
            return gains

        return weigh
