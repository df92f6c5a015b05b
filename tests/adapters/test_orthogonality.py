from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hilora
from hilora import kernels
from hilora.adapters import orthogonality
from hilora.adapters.injection import banks
from hilora.adapters.orthogonality import tier_penalties
from tests.helpers import CONFIG, injected, randomise


def dense(model: nn.Module, active: str, gammas: dict[str, float], slots: dict[str, int] | None = None) -> Tensor:
    """Σ γ ‖B_frozenᵀ B_active‖² over all projections, one by one."""
    total: Tensor = torch.zeros((), dtype=torch.float64)
    for bank in banks(model):
        for projection in range(len(bank.names)):
            own = bank.B(active)[projection, (slots or {}).get(active, 0)].double()
            for tier, gamma in gammas.items():
                slot = (slots or {}).get(tier, 0)
                if slot >= 0:
                    total = total + gamma * (bank.B(tier)[projection, slot].double().T @ own).square().sum()
    return total


@pytest.mark.parametrize(
    ("active", "weights"),
    [("cluster", {"root": 0.5}), ("leaf", {"root": 0.5, "cluster": 2.0}), ("leaf", {"root": 0.0, "cluster": 1.0})],
)
def test_the_penalty_is_that_of_the_paper(active: str, weights: dict[str, float]) -> None:
    model = injected(hilora.HiLoRAConfig(r=3, target_modules=("q", "v", "fc1", "proj"))).double()
    hilora.set_active_tier(model, active)
    penalty = hilora.orthogonality_penalty(model, **{f"gamma_{tier}": gamma for tier, gamma in weights.items()})
    expected = dense(model, active, weights)
    torch.testing.assert_close(penalty, expected, rtol=1e-12, atol=0)
    trained = [p for name, p in model.named_parameters() if name.endswith(f"lora_B.{active}")]
    got, want = (torch.autograd.grad(value, trained) for value in (penalty, expected))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_the_weights_default_to_a_tenth() -> None:
    model = injected()
    hilora.set_active_tier(model, "leaf")
    expected = dense(model, "leaf", {"root": 0.1, "cluster": 0.1})
    torch.testing.assert_close(hilora.orthogonality_penalty(model).double(), expected)
    torch.testing.assert_close(
        hilora.orthogonality_penalty(model, gamma_cluster=1.0).double(),
        dense(model, "leaf", {"root": 0.1, "cluster": 1.0}),
    )


def test_frozen_tiers_get_no_gradient() -> None:
    model = injected()
    hilora.set_active_tier(model, "cluster")
    hilora.orthogonality_penalty(model).backward()
    assert [n.partition(".qkv.")[2] for n, p in model.named_parameters() if p.grad is not None] == [
        "lora_B.cluster"
    ] * 2


def test_there_is_no_penalty_for_the_first_tier_or_a_zero_b_or_no_training() -> None:
    model = injected()
    assert hilora.orthogonality_penalty(model) == 0
    hilora.set_active_tier(model, "cluster")
    assert hilora.orthogonality_penalty(model) > 0
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.cluster"):
            nn.init.zeros_(parameter)
    assert hilora.orthogonality_penalty(model) == 0
    for bank in banks(model):
        bank.activate(None)
    assert hilora.orthogonality_penalty(model) == 0


def test_clients_of_a_batch_have_penalties_of_their_own() -> None:
    model = injected().double()
    slots = {"cluster": [1, 0, -1, 1], "leaf": [0, 2, 3, 3]}
    hilora.set_slots(model, **{tier: torch.tensor(slot) for tier, slot in slots.items()})
    randomise(model, seed=1)
    hilora.set_active_tier(model, "leaf")
    each = tier_penalties(model, gamma_root=0.5, gamma_cluster=2.0)
    expected = torch.stack(
        [dense(model, "leaf", {"root": 0.5, "cluster": 2.0}, {t: s[g] for t, s in slots.items()}) for g in range(4)]
    )
    torch.testing.assert_close(each, expected, rtol=1e-12, atol=0)
    total = hilora.orthogonality_penalty(model, gamma_root=0.5, gamma_cluster=2.0)
    torch.testing.assert_close(total, expected.sum(), rtol=1e-12, atol=0)
    leaves = [p for name, p in model.named_parameters() if name.endswith("lora_B.leaf")]
    for got, want in zip(*(torch.autograd.grad(value, leaves) for value in (total, expected.sum())), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("root", [[0, 0, 0], [0, -1, 0]])
def test_an_adapter_that_all_clients_share_is_not_copied_for_each(
    root: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = injected()
    hilora.set_slots(model, root=torch.tensor(root), leaf=torch.tensor([1, 0, 2]))
    randomise(model, seed=1)
    hilora.set_active_tier(model, "leaf")
    seen = []
    penalty = kernels.gram_penalty

    def noted(*call: Any, **more: Any) -> Any:
        seen.append(call)
        return penalty(*call, **more)

    monkeypatch.setattr(kernels, "gram_penalty", noted)
    found = tier_penalties(model)
    assert [B.shape[1] for B in seen[0][1]] == [1 if root == [0, 0, 0] else 3, 1]
    monkeypatch.setattr(orthogonality, "_shared", lambda bank, tier: False)
    assert torch.equal(found, tier_penalties(model))


def test_a_client_without_an_adapter_of_the_active_tier_pays_nothing() -> None:
    model = injected()
    hilora.set_slots(model, leaf=torch.tensor([-1, 0]))
    hilora.set_active_tier(model, "leaf")
    first, second = tier_penalties(model).tolist()
    assert first == 0
    assert second > 0


def test_scales_of_what_is_held_count_as_if_they_were_in_b() -> None:
    model, scales = injected(), torch.tensor([2.0, -3.0])
    (bank,) = banks(model)
    slots = {"root": torch.tensor([0, 0]), "cluster": torch.tensor([1, 0]), "leaf": torch.tensor([0, 1])}
    hilora.set_slots(model, **slots)
    randomise(model)
    penalties = []
    for apart in (True, False):
        for tier in bank.tiers:
            own, A, B = scales[: bank.slot_count(tier)], bank.A(tier).detach(), bank.B(tier).detach()
            B, own = (B, own) if apart else (B * own[:, None, None], torch.ones_like(own))
            bank.hold(tier, A, B.requires_grad_(tier == "leaf"), bank.slots[tier], None, own)
        penalties.append(tier_penalties(model))
        bank.release()
    torch.testing.assert_close(*penalties)


def test_tiers_without_adapters_are_left_out() -> None:
    model = injected(hilora.HiLoRAConfig(r=2, slots={"root": 0, "cluster": 1, "leaf": 1}))
    hilora.set_active_tier(model, "leaf")
    penalty = hilora.orthogonality_penalty(model, gamma_root=5.0, gamma_cluster=1.0)
    torch.testing.assert_close(penalty.double(), dense(model, "leaf", {"cluster": 1.0}))


def test_descending_the_penalty_makes_tiers_orthogonal() -> None:
    model = injected()
    hilora.set_active_tier(model, "cluster")
    optimiser = torch.optim.SGD([p for n, p in model.named_parameters() if n.endswith("lora_B.cluster")], lr=0.1)
    before = hilora.orthogonality_penalty(model, gamma_root=1.0).item()
    for _ in range(100):
        optimiser.zero_grad()
        hilora.orthogonality_penalty(model, gamma_root=1.0).backward()
        optimiser.step()
    assert hilora.orthogonality_penalty(model, gamma_root=1.0) < 1e-4 * before


def test_the_penalty_is_fp32_under_autocast() -> None:
    model = injected()
    hilora.set_active_tier(model, "leaf")
    with torch.autocast("cpu", torch.bfloat16):
        penalty = hilora.orthogonality_penalty(model)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, hilora.orthogonality_penalty(model))


@pytest.mark.parametrize("name", ["root", "gamma_lief", "lambda_root"])
def test_unknown_weights_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=f"there is no '{name}': expected gamma_root, gamma_cluster, gamma_leaf"):
        hilora.orthogonality_penalty(injected(CONFIG), **{name: 0.1})
