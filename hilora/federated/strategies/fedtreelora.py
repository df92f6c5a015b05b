"""FedTreeLoRA (Bian et al., Reconciling Statistical and Functional Heterogeneity in Federated LoRA Fine-Tuning, ICML
2026): one tree over the clients, which each layer cuts at a depth of its own."""

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
from hilora.algorithms.trees import Tree, frobenius_distances
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Rows, Stage, Upload, own
from hilora.federated.settings import Number, TrainingSettings, Whole
from hilora.federated.strategies.own_head import SharableHead
from hilora.federated.strategies.warm_up import WARM, WarmedUp, spread_out

CERTAIN = 40.0
"""A logit whose sigmoid is 1, with a gradient of 0: of the share of a group that nobody is outside of."""


class FedTreeLoRA(WarmedUp):
    """After a warm-up `D_l(i, j) = ‖B_i − B_j‖_F`, averaged over the projections of block l, and their mean over blocks
    gives one agglomerative tree of the clients. From the first block to the last, c_l groups are cut from it:

        c_l = argmax φ(c; D_l)  over  c_(l−1) ≤ c < min(N, c_(l−1) + K)        c_0 = 1

    with φ the mean silhouette of the cut's groups in D_l, and φ(1) = τ. So groups only ever split from block to block.
    In each block a client has the mean of its group's adapters and, frozen, that of all other clients':

        y = W0 x + λ B_in A_in x + (1 − λ) B_out A_out x

    It trains the first, its λ = σ(·) of each projection and its head, and sends the first. Where one group is all
    clients, nobody is outside, and λ is 1.

    From the abstract and notes on the paper; left open there, ours: the distance is the Frobenius norm, the linkage
    that of averages, τ and K have our defaults; λ starts at ½ and is one for each projection. The head is private,
    unless `shared_head` says otherwise. Means weigh clients by images; where only some take part in a round, the
    others' last ones count in what is outside. The warm-up lasts for the rounds of the root tier. An unseen client
    takes the place in the tree of the seen one whose B is nearest.
    """

    class Settings(SharableHead.Settings):
        window: Whole = Field(3, ge=1, description="K, less than so many groups are added from a block to the next")
        tau_one: Number = Field(0.2, ge=-1, le=1, description="τ, the silhouette that groups must exceed to be formed")

    name = "fedtreelora"
    tiers = ("root", "cluster")
    settings: Settings

    def adapters(self, training: TrainingSettings) -> HiLoRAConfig:
        return replace(
            super().adapters(training), r=training.rank["cluster"], lora_alpha=training.lora_alpha["cluster"]
        )

    def start(self) -> None:
        super().start()
        everyone = self.problem.clients
        self.cut = torch.zeros(everyone, 0, dtype=torch.long)  # [N, L], the group of each client in each block
        self.weight = torch.zeros(everyone, dtype=torch.long)  # images
        self.known = torch.empty(0, dtype=torch.long)

    @property
    def formed(self) -> bool:
        return len(self.known) > 0

    def form(self, upload: Upload) -> None:
        self.known, self.warm = upload.clients, upload.tiers["cluster"].only("B")
        block = torch.cat(list(self.problem.blocks))
        distances = frobenius_distances(self.warm.B)
        of_blocks = torch.stack([distances[block == number].mean(0) for number in range(int(block.max()) + 1)])
        labels = self.cuts(of_blocks)
        self.cut = spread_out(labels, upload.clients, self.problem.clients)
        self.weight[upload.clients] = upload.images
        self.cluster = self.first().repeated(self.problem.clients)
        self._average(upload)

    def cuts(self, distances: Tensor) -> Tensor:
        """The groups of N clients in L blocks, int64 `[N, L]`, from their distances `[L, N, N]`."""
        tree, clients, count, found = Tree(distances.mean(0)), distances.shape[-1], 1, []
        for of_block in distances:
            sides = range(count, max(count + 1, min(clients, count + self.settings.window)))
            cut = tree.best(sides, of_block, self.settings.tau_one)
            count = cut.k
            found.append(cut.labels)
        return torch.stack(found, 1)

    def place(self, clients: Tensor, table: AdapterTable) -> None:
        both = [torch.cat([known, new]) for known, new in zip(self.warm.B, table.B, strict=True)]
        distances = frobenius_distances(both).mean(0)[len(self.known) :, : len(self.known)]
        nearest = self.known[distances.argmin(1)]
        self.cut[clients] = self.cut[nearest]
        self.cluster.put(clients, self.cluster.rows(nearest))

    def adapters_for(self, stage: Stage, clients: Tensor) -> Download:
        return Download(stage, {"root": own(self._outside(clients)), "cluster": Rows(self.cluster, clients)})

    def aggregate(self, stage: Stage, upload: Upload) -> dict[str, Any]:
        if stage.task == WARM or not self.formed:
            return {}
        self.average_heads(upload)
        self.weight[upload.clients] = upload.images
        self._average(upload)
        return {}

    def _average(self, upload: Upload) -> None:
        """Every group of every block gets the mean of what its members sent."""
        sent, cluster = upload.tiers["cluster"], self.cluster.each(Tensor.clone)
        for block in range(self.cut.shape[1]):
            for group in self.cut[upload.clients, block].unique():
                members = self.cut[upload.clients, block] == group
                if not upload.images[members].sum() > 0:
                    continue
                everyone = self.cut[:, block] == group
                before = self._part(self.cluster.rows(everyone.nonzero()[:1, 0]), block)
                mean = self.averaging.mean(self._part(sent.rows(members), block), upload.images[members], before)
                self._fill(cluster, everyone, block, mean)
        self.cluster = cluster

    def _outside(self, clients: Tensor) -> AdapterTable:
        """For clients `[n]`, in each block the mean over those that are not of their group; none where all are."""
        found = self.cluster.rows(clients).each(torch.zeros_like)
        has = torch.zeros(len(clients), self.cut.shape[1], dtype=torch.bool)
        for block in range(self.cut.shape[1]):
            mine = self.cut[clients, block]
            for group in mine.unique():
                outside = self.known[self.cut[self.known, block] != group]
                if self.weight[outside].sum() > 0:
                    rows = self._part(self.cluster.rows(outside), block)
                    start = self._part(self.first(), block)
                    mean = self.averaging.mean(rows, self.weight[outside], start)
                    self._fill(found, mine == group, block, mean)
                    has[mine == group, block] = True
        return self.of_blocks(found, has)

    def _part(self, table: AdapterTable, block: int) -> AdapterTable:
        """The adapters of one block."""
        inside = [of == block for of in self.problem.blocks]
        A, B = ([one[:, some] for one, some in zip(f, inside, strict=True)] for f in (table.A, table.B))
        return AdapterTable(A, B, table.rank)

    def _fill(self, table: AdapterTable, rows: Tensor, block: int, mean: AdapterTable) -> None:
        """Write one row of adapters of a block into some rows `[S]` of a table."""
        for factor in "AB":
            for whole, part, of in zip(getattr(table, factor), getattr(mean, factor), self.problem.blocks, strict=True):
                if part.shape[1]:
                    whole[rows.nonzero(), (of == block).nonzero().T] = part.to(whole)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        done = self.alone(state, download, trainer)
        if done is not None:
            return done
        trained = trainer.train(self.models(state, download, trainer), "cluster", rates=download.stage.rates)
        assert trained.composition is not None
        state.put("shares", Values(**trained.composition.tensors()))
        self.keep_heads(state, trained)
        return trained.upload("cluster", head=self.shares_head)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        if download.stage.task == WARM:
            return self.by_itself(state)
        outside = download.tiers["root"].taken()
        shares = state.filled("shares", lambda: first_shares(outside)).taken()
        composition = Mixed(list(shares.tensors().values()))
        tiers = {**download.tiers, "root": own(AdapterTable(outside.A, outside.B, outside.rank))}
        return Models(tiers, self.heads(state, download), composition)


def first_shares(outside: AdapterTable) -> Values:
    """The logits of λ that n clients begin with, for every shape of projection `[n, P]`: λ is ½, and 1 where nobody is
    outside of their group."""
    pairs = zip(outside.A, outside.has, strict=True)
    return Values(
        **{f"share.{index}": torch.where(has.to(A.device), 0.0, CERTAIN).to(A) for index, (A, has) in enumerate(pairs)}
    )


class Mixed(Composition):
    """`λ cluster(x) + (1 − λ) root(x)`, λ a trained number for each client and projection.

    Args:
        logits: of λ, for every shape of projection, `[n, P]`.
    """

    trained = True

    def __init__(self, logits: Sequence[Tensor]) -> None:
        self.logits = tuple(logits)

    def tensors(self) -> dict[str, Tensor]:
        return {f"share.{index}": logits for index, logits in enumerate(self.logits)}

    def like(self, tensors: dict[str, Tensor]) -> Mixed:
        return Mixed(list(tensors.values()))

    def gains(self, bank: int) -> Gains:
        logits = self.logits[bank].T  # [P, G]

        def weigh(position: int, x: Tensor) -> Mapping[str, float | Tensor]:
            share = torch.sigmoid(logits[position])[:, None].expand(x.shape[:2])
            return {"cluster": share, "root": 1 - share}

        return weigh
