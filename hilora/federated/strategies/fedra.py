"""FedRA (Su et al., A Random Allocation Strategy for Federated Tuning to Unleash the Power of Heterogeneous Clients,
ECCV 2024): each client tunes a model of some of the blocks, drawn anew each round."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hilora.federated.engine.blocks import Parts
from hilora.federated.protocol import Download, Stage, own
from hilora.federated.strategies.some_blocks import SomeBlocks
from hilora.federated.streams import stream


class FedRA(SomeBlocks):
    """A client has its blocks alone, in their order, frozen weights and adapters; what the others would have added is
    left out of its forward pass while it trains.

    The allocation, clients by blocks, is uniform with as many blocks in a row as the client's budget has. Then blocks
    that nobody drew take the places of ones that several have, so that each is trained wherever the budgets of a round
    add up to all. (The authors' code has this step commented out.)
    """

    name = "fedra"

    def drawn(self, clients: Tensor) -> Tensor:
        return allocation(self.budget(clients), self.problem.depth, stream(self.training.seed, "blocks", self.done))

    def parts(self, blocks: Tensor) -> Parts:
        return Parts.having(blocks)

    def configure(self, stage: Stage, clients: Tensor) -> Download:
        download = self.serve(stage, clients)
        assert download.blocks is not None
        sent = self.of_blocks(self.root.repeated(len(clients)), download.blocks)
        return replace(download, tiers={"root": own(sent)})

    def serve(self, stage: Stage, clients: Tensor) -> Download:
        return super().configure(stage, clients)  # the whole model


def allocation(budgets: Tensor, depth: int, draws: torch.Generator) -> Tensor:
    """Which of L blocks each of n clients has: bool `[n, L]`, as many in row i as `budgets[i]` says; every block in
    some row, where there are enough."""
    order = torch.rand(len(budgets), depth, generator=draws).argsort(1).argsort(1)
    found = order < budgets[:, None]
    while (missing := (~found.any(0)).nonzero().flatten()).numel():
        spare = (found & (found.sum(0) > 1)).nonzero()  # (client, block) that others have, too
        if not len(spare):
            break
        client, block = spare[torch.randint(len(spare), (), generator=draws)]
        found[client, block] = False
        found[client, missing[torch.randint(len(missing), (), generator=draws)]] = True
    return found
