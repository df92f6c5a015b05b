"""The first of the paper's inventions: tiers whose column spaces are pushed to be orthogonal."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hilora import kernels
from hilora.adapters.bank import AdapterBank
from hilora.adapters.injection import banks
from hilora.errors import InvalidValueError

DEFAULT_GAMMA = 0.1


def orthogonality_penalty(model: nn.Module, /, **gammas: float) -> Tensor:
    """Overlap of the tier in training with the frozen tiers before it: `Σ_P Σ_tier γ_tier ‖B_tierᵀ B_active‖²_F`.

    HiLoRA's cluster loss is `task + γ_c ‖B_rᵀB_c‖²`, its leaf loss `task + γ_c ‖B_rᵀB_l‖² + γ_l ‖B_cᵀB_l‖²`; here γ_c
    is `gamma_root` and γ_l is `gamma_cluster`. Where slots tell clients apart, the penalties of all clients are added.

    Args:
        model: a model with adapters.
        gammas: `gamma_<tier>`, the weight of a later tier's overlap with that tier; 0.1 where not given.

    Returns:
        A scalar with a gradient for the tier in training; zero while that is the first one, or its B is zero.

    Raises:
        ValueError: for a tier that the adapters do not have.
    """
    return tier_penalties(model, **gammas).sum()


def tier_penalties(model: nn.Module, /, **gammas: float) -> Tensor:
    """`orthogonality_penalty` for each client of a batch: `[G]`."""
    found = banks(model)
    known = [f"gamma_{tier}" for tier in found[0].tiers]
    for name in gammas:
        if name not in known:
            raise InvalidValueError(f"there is no {name!r}: expected {', '.join(known)}")
    return sum((_penalties(bank, gammas) for bank in found[1:]), start=_penalties(found[0], gammas))


def _penalties(bank: AdapterBank, gammas: dict[str, float]) -> Tensor:
    active = bank.active
    before = bank.tiers[: bank.tiers.index(active)] if active is not None else ()
    used = [tier for tier in before if bank.slot_count(tier)]
    B = _chosen(bank, active or bank.tiers[0])
    apart = active is not None and bank.slots[active] is not None
    frozen = [bank.scaled_B(tier) if apart and _shared(bank, tier) else _chosen(bank, tier) for tier in used]
    return kernels.gram_penalty(B, frozen, [gammas.get(f"gamma_{tier}", DEFAULT_GAMMA) for tier in used], per_slot=True)


def _shared(bank: AdapterBank, tier: str) -> bool:
    """Whether all clients of a batch are known to use the tier's only adapter, which then need not be copied for each.

    Where slots lie on a GPU, or are traced, the answer would have to be waited for: then it is no.
    """
    slot = bank.slots[tier]
    if slot is None or slot.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return bank.slot_count(tier) == 1 and bool((slot >= 0).all())


def _chosen(bank: AdapterBank, tier: str) -> Tensor:
    """B of the adapters that the clients of a batch use: `[P, G or 1, out, r]`; zero for those that use none."""
    B = bank.scaled_B(tier)
    slot = bank.slots[tier]
    if slot is None:
        return B
    present = (slot >= 0)[:, None, None]
    return torch.where(present, B[:, slot.clamp_min(0)], 0)
