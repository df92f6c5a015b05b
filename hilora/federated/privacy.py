"""Differential privacy of whole clients: what each changed is clipped, and their sum is given noise (McMahan et al.,
Learning Differentially Private Recurrent Language Models, 2018)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hilora.algorithms.robust import clipping_scales
from hilora.errors import InvalidValueError
from hilora.federated.protocol import Download, Upload
from hilora.federated.settings import TrainingSettings
from hilora.federated.streams import stream
from hilora.federated.sums import changes, groups, norms, spread

NOT_COVERED = (
    "figures of metrics.jsonl and summary.json that are measured on the clients' images: losses, accuracies, counts",
    "who took part, whose message was left out, and who is in which group",
    "whoever knows the seed of the noise",
)


class Privacy:
    """Clips all that a client changed to the norm C = `dp_clip`, A, B and head as one vector, and gives the sum
    Gaussian noise of the standard deviation zC, z = `dp_noise`. The strategy sees messages that say no more than the
    noised mean (`sums.spread`), so whatever it makes of them is covered. Every client counts alike, and one whose
    message is left out changed nothing: the number of images is a secret, too.

    The relation is "one client replaced by another", which moves the sum by at most 2C: a round is a Gaussian mechanism
    of the noise multiplier z/2. Clients of a round are drawn without replacement, a fixed number; the accountant of
    `dp-accounting` has the bound of Wang et al. (Subsampled Rényi Differential Privacy, 2019) for that, an upper one,
    as is its conversion from Rényi divergences: what is spent is at most ε. Rounds in which clients are in several
    groups, each with a mean and noise of its own, count without the gain of sampling: the groups show who took part.

    Args:
        settings: of the training.
        seed: of the noise; by default that of the settings, for runs that can be repeated.

    Raises:
        InvalidValueError: if `dp-accounting` is not installed.
    """

    def __init__(self, settings: TrainingSettings, seed: int | None = None) -> None:
        assert settings.dp_clip is not None
        self.clip, self.noise, self.delta = settings.dp_clip, settings.dp_noise, settings.dp_delta
        self.share = settings.participation
        self.seed = settings.seed if seed is None else seed
        self.rounds = Counter[tuple[int, int]]()  # how many released a mean of so many, drawn from so many; 0: groups
        self.epsilon()

    def release(self, upload: Upload, download: Download, usable: Tensor, number: int, clients: int) -> Upload:
        """The messages of n clients as ones that say no more than the noised mean of each group.

        Args:
            upload: what they sent.
            download: what they were sent, in the same order.
            usable: bool `[n]`, whose changes count; those of the others are taken for zero.
            number: of the round in the run, which the noise depends on.
            clients: how many the n were drawn from.
        """
        changed = changes(upload, download)
        if not changed:
            return Upload(upload.clients, torch.ones_like(upload.images))
        changed = {name: torch.where(_wide(usable, value), value, 0) for name, value in changed.items()}
        scales = clipping_scales(norms(changed, len(usable)), self.clip)
        group, draws = groups(download), stream(self.seed, "noise", number)
        mean = {}
        for name in sorted(changed):
            value = changed[name].double() * _wide(scales, changed[name])
            sums = value.new_zeros(int(group.max()) + 1, *value.shape[1:]).index_add_(0, group.to(value.device), value)
            noise = torch.randn(sums.shape, generator=draws, dtype=torch.float64).to(sums)
            sums += self.noise * self.clip * noise
            found = sums / _wide(group.bincount(), sums)
            mean[name] = found[group.to(found.device)].to(changed[name])
        drawn = max(1, round(self.share * clients), len(usable))  # also those who sent nothing
        self.rounds[(0, 0) if group.any() else (drawn, max(drawn, clients))] += 1
        return spread(upload, download, mean)

    def epsilon(self) -> float:
        """What all releases so far have spent at most, at `dp_delta`."""
        return _epsilon(tuple(sorted(self.rounds.items())), self.noise / 2, self.delta)

    def summary(self) -> dict[str, Any]:
        return {
            "epsilon": self.epsilon(),
            "delta": self.delta,
            "clip": self.clip,
            "noise": self.noise,
            "releases": self.rounds.total(),
            "relation": "one client replaced by another",
            "bound": "Rényi, fixed-size sampling without replacement: an upper bound",
            "not_covered": list(NOT_COVERED),
        }

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": [[drawn, clients, count] for (drawn, clients), count in self.rounds.items()]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = Counter({(drawn, clients): count for drawn, clients, count in state["rounds"]})


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """A number for each row of a tensor `[n, ...]`."""
    return values.to(like.device).view(-1, *[1] * (like.dim() - 1))


@lru_cache(maxsize=1024)
def _epsilon(rounds: tuple[tuple[tuple[int, int], int], ...], multiplier: float, delta: float) -> float:
    """The smaller of two upper bounds: with the gain of sampling, and without."""
    try:
        import dp_accounting as accounting
    except ModuleNotFoundError as error:
        raise InvalidValueError(f"dp_clip needs {error.name}: pip install 'hilora[privacy]'") from None
    gaussian = accounting.GaussianDpEvent(multiplier)
    bounds = []
    for sampled in (True, False):
        accountant = accounting.rdp.RdpAccountant(neighboring_relation=accounting.NeighboringRelation.REPLACE_ONE)
        for (drawn, clients), count in rounds:
            one = accounting.SampledWithoutReplacementDpEvent(clients, drawn, gaussian)
            accountant.compose(one if sampled and drawn else gaussian, count)
        bounds.append(float(accountant.get_epsilon(delta)))
    return min(bounds)
