"""What the paper's Theorem 1 bounds a client's excess risk by, measured at the end of each stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hilora import kernels
from hilora.federated.callbacks.base import Callback, Round
from hilora.federated.client import Models
from hilora.federated.streams import stream

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation

SAMPLE = 32  # training images of each client, drawn at random, that its empirical loss is measured on


class Diagnostics(Callback):
    """The theorem's terms for the seen clients."""

    name = "diagnostics"

    def __init__(self) -> None:
        self.terms: dict[str, dict[str, Any]] = {}

    def measure(self, simulation: Simulation, round: Round) -> None:
        if round.last:
            self._measured = self._diagnose(simulation, round)

    def _diagnose(self, simulation: Simulation, round: Round) -> dict[str, Any]:
        seen, images = simulation.population.seen, simulation.train_images
        models = simulation.models(seen)
        shares = [simulation.population.clients[client].train for client in seen.tolist()]
        draws = [stream(simulation.settings.seed, "diagnosis", client) for client in seen.tolist()]
        some = [own[torch.randperm(len(own), generator=d)[:SAMPLE]] for own, d in zip(shares, draws, strict=True)]
        loss = simulation.engine.evaluate(images, some, models).loss
        counts = simulation.population.class_counts(images.labels, len(images.classes))[seen]
        member = torch.zeros(len(seen), dtype=torch.long) if models.cluster is None else models.cluster
        alone = round.stage.private or not simulation.server.travels
        return diagnose(loss, models, counts, None if alone else member)

    def commit(self, simulation: Simulation, round: Round) -> None:
        if round.last:
            self.terms[round.stage.tier] = self._measured

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
        return {"diagnostics": self.terms}

    def state_dict(self) -> dict[str, Any]:
        return {"terms": self.terms}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.terms = state["terms"]


def diagnose(loss: Tensor, models: Models, counts: Tensor, member: Tensor | None) -> dict[str, Any]:
    """The three terms for the models of n clients.

    Args:
        loss: `[n]`, each client's mean cross entropy on training images of its own; NaN where it has none.
        models: of these clients.
        counts: `[n, classes]`, their training images by class.
        member: int64 `[n]`, the group that the tier was trained in; None where each client trained alone.

    Returns:
        `train_loss`, the empirical loss (EO, which must not rise from tier to tier); `overlap`, for each earlier tier
        that is not zero, mean `‖U_earlierᵀ U_last‖²_F / r` of the last tier's column space with it (GE: 0 orthogonal, 1
        inside of it); `label_distance`, the mean total variation between a client's class proportions and those of its
        group (DS), or None.
    """
    return {
        "train_loss": _mean(loss),
        "overlap": overlaps(models),
        "label_distance": None if member is None else label_distance(counts, member),
    }


def overlaps(models: Models) -> dict[str, float]:
    """Overlap of the last tier with each of the others, a mean over clients and projections. Of subspaces of different
    ranks the smaller one has to lie in the other."""
    *earlier, last = models.tiers
    found = {}
    for tier in earlier:
        pairs = []
        one, other = models.tiers[tier].taken(), models.tiers[last].taken()
        for frozen, B in zip(one.B, other.B, strict=True):
            U, V = kernels.orthonormal_basis(frozen), kernels.orthonormal_basis(B)
            used = U.any(-1).any(-1) & V.any(-1).any(-1)  # [n, P]
            rank = torch.minimum(*(basis.any(-2).sum(-1) for basis in (U, V))).clamp_min(1)  # [n, P]
            pairs.append(((U.mT @ V).square().sum((-2, -1)) / rank)[used])
        value = _mean(torch.cat(pairs))
        if value is not None:
            found[tier] = value
    return found


def label_distance(counts: Tensor, member: Tensor) -> float | None:
    """Mean over clients with images of `½ Σ_c |p_client(c) − p_group(c)|`: 0 alike, 1 without a class in common."""
    counts = counts.double()
    known = counts.sum(1) > 0
    group = torch.stack([counts[member == one].sum(0) for one in member])  # [n, classes]
    own, whole = (value[known] / value[known].sum(1, keepdim=True) for value in (counts, group))
    return _mean((own - whole).abs().sum(1) / 2)


def _mean(values: Tensor) -> float | None:
    known = values[~values.isnan()]
    return float(known.double().mean()) if len(known) else None
