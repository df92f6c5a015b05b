"""SDFLoRA (Shen et al., Selective Decoupled Federated LoRA for Privacy-preserving Fine-tuning with Heterogeneous
Clients, 2026): a shared and a private adapter side by side, of which the shared one alone is aligned and averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hilora.adapters.composition import Composition, Gains
from hilora.adapters.table import AdapterTable, Values
from hilora.federated.client import ClientState, Models
from hilora.federated.engine.trainer import Trainer
from hilora.federated.local.sgd import LocalSGD
from hilora.federated.protocol import Download, Upload
from hilora.federated.strategies.own_adapter import OwnAdapter

FIRST = (0.7, 0.3)
"""What the two gains begin with, before the sigmoid: 0.67 for the shared adapter and 0.57 for the private one."""


class SDFLoRA(OwnAdapter):
    """`y = W0 x + σ(a) B_s A_s x + σ(b) B_p A_p x`, with numbers a and b of each client and projection.

    A client trains both adapters, a, b and its head in the same steps, and sends the shared adapter alone. The server
    stacks those of all clients, the rows of A under each other and the columns of B side by side, so that ranks may
    differ and there are no cross terms; and compresses the stack to the rank of the shared adapter again, by the
    truncated SVD of `Σ π B_s A_s`.

    Clients with a budget of ranks hold the leading ranks of both adapters.

    From the paper's abstract and public code of the method; left open there, ours: clients weigh in the stack by their
    images, so that what all agree on stays as large as it is (the code's constant weights need not sum to one); B_s is
    orthonormal after the SVD and A_s carries the singular values; the head is private unless `shared_head` says
    otherwise, as the code's configuration has it, though not its training; the gains are the code's first form of
    three, with the values that they begin with there. With `dp_clip` the shared adapters' changes of A and B are
    clipped, averaged and noised, so that the mean is one of factors. An unseen client trains its private adapter, its
    gains and its head under the shared adapter as it is.
    """

    name = "sdflora"
    unequal = frozenset({"ranks"})

    def mean(self, upload: Upload) -> AdapterTable:
        return self.averaging.product_mean(upload.tiers["root"], upload.images, self.root)

    def local(self, state: ClientState, download: Download, trainer: Trainer) -> Upload:
        rates = download.stage.rates
        both = LocalSGD(also=("leaf",), rates=rates)
        trained = trainer.train(self.models(state, download, trainer), "root", algorithm=both, rates=rates)
        assert trained.composition is not None
        state.put("gains", Values(**trained.composition.tensors()))
        return self.keep(state, trained)

    def models(self, state: ClientState, download: Download, trainer: Trainer) -> Models:
        plain = super().models(state, download, trainer)
        leaf = plain.tiers["leaf"].table
        gains = state.filled("gains", lambda: first_gains(leaf, len(state.clients))).taken()
        return replace(plain, composition=SigmoidGains(self.tiers, list(gains.tensors().values())))


def first_gains(table: AdapterTable, clients: int) -> Values:
    """The gains that n clients begin with, for every shape of projection of a table `[n, P, 2]`."""
    first = {f"gain.{index}": A.new_tensor(FIRST).expand(clients, A.shape[1], 2) for index, A in enumerate(table.A)}
    return Values(**first).each(Tensor.clone)


class SigmoidGains(Composition):
    """`Σ_tier σ(g_tier) tier(x)`, with a trained number for each client and projection, which need not sum to one.

    Args:
        tiers: the tiers.
        logits: for every shape of projection, `[n, P, tiers]`.
    """

    trained = True

    def __init__(self, tiers: Sequence[str], logits: Sequence[Tensor]) -> None:
        self.tiers, self.logits = tuple(tiers), tuple(logits)

    def tensors(self) -> dict[str, Tensor]:
        return {f"gain.{index}": logits for index, logits in enumerate(self.logits)}

    def like(self, tensors: dict[str, Tensor]) -> SigmoidGains:
        return SigmoidGains(self.tiers, list(tensors.values()))

    def gains(self, bank: int) -> Gains:
        logits = self.logits[bank].transpose(0, 1)  # [P, G, tiers]

        def weigh(position: int, x: Tensor) -> Mapping[str, float | Tensor]:
            shares = torch.sigmoid(logits[position]).unbind(-1)
            return {tier: share[:, None].expand(x.shape[:2]) for tier, share in zip(self.tiers, shares, strict=True)}

        return weigh
