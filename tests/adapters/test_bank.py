from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

from hilora import AdapterBank, HiLoRAConfig
from hilora.kernels import Tier, stacked_lora_linear
from tests.helpers import random, same

CONFIG = HiLoRAConfig(r={"root": 3, "leaf": 2}, lora_alpha=4, tiers=("root", "leaf"), slots={"root": 1, "leaf": 2})


def make(dtype: torch.dtype = torch.float32, count: int = 3) -> AdapterBank:
    """Adapters of some projections 7 → 5, filled with random values."""
    bank = AdapterBank([f"layer{i}" for i in range(count)], CONFIG, like=torch.empty(5, 7, dtype=dtype))
    for seed, parameter in enumerate(bank.parameters()):
        parameter.data = random(*parameter.shape, seed=seed, dtype=parameter.dtype)
    return bank


def gradient(bank: AdapterBank, tier: str, used: list[int]) -> tuple[Tensor, Tensor]:
    """Of Σ_i (i + 1) Σ A_i + (i + 2) Σ B_i² over the projections in `used`, by going through `part`."""
    bank.zero_grad()
    loss: Tensor = torch.zeros(())
    for index in used:
        A, B = bank.part(tier, index)
        assert torch.equal(A, bank.A[tier][index])
        assert torch.equal(B, bank.B[tier][index])
        loss = loss + (index + 1) * A.sum() + (index + 2) * B.square().sum()
    loss.backward()
    return bank.A[tier].grad, bank.B[tier].grad


def expected(bank: AdapterBank, tier: str, used: list[int]) -> tuple[Tensor, Tensor]:
    A, B = bank.A[tier].detach(), bank.B[tier].detach()
    count = torch.tensor([used.count(i) for i in range(len(A))])[:, None, None, None]
    index = torch.arange(len(A))[:, None, None, None]
    return count * (index + 1) * torch.ones_like(A), count * (index + 2) * 2 * B


def assert_right(bank: AdapterBank, tier: str = "root", used: tuple[int, ...] = (0, 1, 2)) -> None:
    for got, want in zip(gradient(bank, tier, list(used)), expected(bank, tier, list(used)), strict=True):
        torch.testing.assert_close(got, want)


def test_fresh_adapters_have_the_shapes_and_change_nothing() -> None:
    bank = AdapterBank(["a", "b", "c"], CONFIG, like=torch.empty(5, 7))
    assert {t: tuple(bank.A[t].shape) for t in bank.tiers} == {"root": (3, 1, 3, 7), "leaf": (3, 2, 2, 7)}
    assert {t: tuple(bank.B[t].shape) for t in bank.tiers} == {"root": (3, 1, 5, 3), "leaf": (3, 2, 5, 2)}
    assert not any(bank.B[tier].any() for tier in bank.tiers)
    A = AdapterBank(["a"], HiLoRAConfig(r=64), like=torch.empty(5, 100)).A["root"].detach()
    bound = 1 / math.sqrt(100)  # kaiming_uniform_(a=√5), as in PEFT
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_fresh_adapters_come_from_the_seed() -> None:
    bank = make()
    one, two, other = (bank.fresh("leaf", 4, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1]), "every slot and projection has values of its own"
    torch.manual_seed(3)
    first = AdapterBank(["a"], CONFIG, like=torch.empty(5, 7))
    torch.manual_seed(3)
    assert torch.equal(AdapterBank(["a"], CONFIG, like=torch.empty(5, 7)).A["root"], first.A["root"])


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_fp32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert {parameter.dtype for parameter in make(dtype).parameters()} == {wide}


def test_one_tier_is_active() -> None:
    bank = make()
    assert bank.active == "root"
    bank.activate("leaf")
    assert bank.active == "leaf"
    assert [name for name, p in bank.named_parameters() if p.requires_grad] == ["A.leaf", "B.leaf"]
    bank.A["leaf"].requires_grad_(False)  # FFA-LoRA trains B alone
    assert bank.active == "leaf"
    bank.activate(None)
    assert bank.active is None


def test_growing_keeps_old_adapters_and_the_parameter() -> None:
    bank = make()
    parameter, before = bank.B["leaf"], bank.B["leaf"].detach().clone()
    bank.grow("leaf", 5)
    assert bank.B["leaf"] is parameter
    assert bank.A["leaf"].shape == (3, 5, 2, 7)
    assert torch.equal(bank.B["leaf"][:, :2], before)
    assert not bank.B["leaf"][:, 2:].any()
    assert bank.A["leaf"][:, 2:].any()
    bank.grow("leaf", 3)
    assert bank.A["leaf"].shape[1] == 5, "tables never shrink by growing"


def test_assigning_replaces_a_table() -> None:
    bank = make()
    A, B = random(3, 4, 3, 7), random(3, 4, 5, 3)
    bank.A["root"].grad = torch.ones_like(bank.A["root"])
    bank.assign("root", A, B)
    assert torch.equal(bank.A["root"], A)
    assert torch.equal(bank.B["root"], B)
    assert bank.A["root"].grad is None
    assert bank.A["root"].requires_grad


@pytest.mark.parametrize(
    ("A", "B"),
    [
        ((3, 1, 3, 8), (3, 1, 5, 3)),
        ((3, 1, 2, 7), (3, 1, 5, 2)),
        ((3, 2, 3, 7), (3, 1, 5, 3)),
        ((2, 1, 3, 7), (2, 1, 5, 3)),
        ((3, 3, 7), (3, 5, 3)),
    ],
)
def test_tables_that_do_not_fit_are_refused(A: tuple[int, ...], B: tuple[int, ...]) -> None:
    bank = make()
    before = copy.deepcopy(bank.state_dict())
    with pytest.raises(ValueError, match=r"do not fit tier 'root': expected \[3, S, 3, 7\] and \[3, S, 5, 3\]"):
        bank.assign("root", torch.zeros(A), torch.zeros(B))
    assert same(dict(before), dict(bank.state_dict()))


def test_select_takes_one_adapter_of_all_projections() -> None:
    bank = make()
    A, B = bank.select("leaf", 1)
    assert torch.equal(A, bank.A["leaf"][:, 1])
    assert torch.equal(B, bank.B["leaf"][:, 1])
    for slot in (-1, 2):
        with pytest.raises(IndexError, match=f"tier 'leaf' has 2 slots, there is no slot {slot}"):
            bank.select("leaf", slot)


def test_parts_are_the_adapters_of_a_projection_with_their_gradient() -> None:
    bank = make()
    for tier in bank.tiers:
        for index in range(3):
            A, B = bank.part(tier, index)
            assert torch.equal(A, bank.A[tier][index])
            assert torch.equal(B, bank.B[tier][index])
            assert A.requires_grad == (tier == "root")
    assert_right(bank)
    assert_right(bank, used=(2, 0))
    assert_right(bank, used=(1, 1, 1))


def test_a_forward_pass_takes_the_bank_apart_once() -> None:
    bank = make(count=8)
    nodes = {bank.part("root", index)[0].grad_fn for index in range(8)}
    assert len(nodes) == 1, "each part of its own would write a gradient of the whole bank"
    again = {bank.part("root", index)[0].grad_fn for index in range(8)}
    assert len(again) == 1
    assert not again & nodes, "forward passes share no node"


def test_two_forwards_before_one_backward_and_two_backwards_after() -> None:
    bank = make()
    first, second = (sum((i + 1) * bank.part("root", i)[0].sum() for i in range(3)) for _ in range(2))
    (first + second).backward()  # type: ignore[union-attr]
    torch.testing.assert_close(bank.A["root"].grad, 2 * expected(bank, "root", [0, 1, 2])[0])
    bank.zero_grad()
    first, second = (sum((i + 1) * bank.part("root", i)[0].sum() for i in range(3)) for _ in range(2))
    second.backward()  # type: ignore[union-attr]
    first.backward()  # type: ignore[union-attr]
    torch.testing.assert_close(bank.A["root"].grad, 2 * expected(bank, "root", [0, 1, 2])[0])


def test_parts_follow_every_change_of_the_parameters() -> None:
    """Each change comes in the middle of a forward pass, when other parts have been handed out."""
    bank = make()

    def step() -> None:
        for parameter in bank.parameters():
            parameter.grad = torch.ones_like(parameter)
        torch.optim.SGD(bank.parameters(), lr=0.1).step()

    def toggle() -> None:
        bank.activate("leaf")
        bank.part("root", 0)
        bank.activate("root")

    def without_grad() -> None:
        with torch.no_grad():
            bank.part("root", 1)

    changes = {
        "an optimiser's step": step,
        "load_state_dict": lambda: bank.load_state_dict({k: v + 1 for k, v in bank.state_dict().items()}),
        "load_state_dict(assign=True)": lambda: bank.load_state_dict(make(count=3).state_dict(), assign=True),
        "assign": lambda: bank.assign("root", random(3, 1, 3, 7, seed=9), random(3, 1, 5, 3, seed=8)),
        "grow": lambda: bank.grow("root", 4),
        "another dtype": lambda: bank.double(),
        "and back": lambda: bank.float(),
        "another tier": toggle,
        "no_grad": without_grad,
        "an earlier forward": lambda: gradient(bank, "root", [1]),
    }
    for name, change in changes.items():
        bank.part("root", 0)
        change()
        try:
            assert_right(bank, used=(1, 2, 0))
        except (AssertionError, RuntimeError) as error:
            raise AssertionError(f"after {name}: {error}") from error


def test_parts_need_no_gradient_where_none_is_asked_for() -> None:
    bank = make()
    bank.part("root", 0)
    with torch.no_grad():
        assert bank.part("root", 1)[0].grad_fn is None
    with torch.inference_mode():
        assert torch.equal(bank.part("root", 1)[1], bank.B["root"][1])
    assert bank.part("root", 1)[0].requires_grad
    bank.A["root"].requires_grad_(False)  # FFA-LoRA trains B alone
    A, B = bank.part("root", 2)
    assert not A.requires_grad
    assert B.requires_grad


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bank = make(torch.float64, count=2)

    def forward(self, x: Tensor) -> Tensor:
        for index in range(2):
            A, B = self.bank.part("root", index)
            x = stacked_lora_linear(x, torch.eye(7, dtype=torch.float64)[:5], None, [Tier(A, B, 0.5)])
            x = torch.nn.functional.pad(x, (0, 2))
        return x


def test_functional_call_sees_the_parameters_it_was_given() -> None:
    layer = Layer()
    x = random(4, 7, dtype=torch.float64)
    own = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    layer.bank.part("root", 1)  # a forward pass that was cut off

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum()

    layer(x).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    by_func = torch.func.grad(loss)(own)
    leaves = {name: value.clone().requires_grad_() for name, value in own.items()}
    by_autograd = torch.autograd.grad(loss(leaves), [leaves[name] for name in wanted])
    aliases = {name: nn.Parameter(parameter.detach()) for name, parameter in layer.named_parameters()}
    layer.bank.part("root", 1)
    by_alias = torch.autograd.grad(loss(aliases), [aliases[name] for name in wanted])  # type: ignore[arg-type]
    for index, name in enumerate(wanted):
        torch.testing.assert_close(by_func[name], wanted[name])
        torch.testing.assert_close(by_autograd[index], wanted[name])
        torch.testing.assert_close(by_alias[index], wanted[name])
    stacked = {name: torch.stack([value, 2 * value]) for name, value in own.items()}
    each = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(each[0], loss(own))
    torch.testing.assert_close(each[1], loss({name: 2 * value for name, value in own.items()}))


def test_banks_can_be_copied_and_pickled_in_the_middle_of_a_forward_pass() -> None:
    bank = make()
    bank.slots["leaf"] = torch.tensor([1, -1], dtype=torch.int32)
    bank.part("root", 0)
    for other in (copy.deepcopy(bank), pickle.loads(pickle.dumps(bank))):
        assert same(dict(other.state_dict()), dict(bank.state_dict()))
        assert same(other.slots, bank.slots)
        assert other.names == bank.names
        assert_right(other)
        assert all(a is not b for a, b in zip(other.parameters(), bank.parameters(), strict=True))
    assert_right(bank)


def test_slots_move_with_the_adapters_and_stay_integers() -> None:
    bank = make()
    bank.slots["leaf"] = torch.tensor([1, 0], dtype=torch.int32)
    bank.double().to("meta")
    slots = bank.slots["leaf"]
    assert slots is not None
    assert slots.device.type == "meta"
    assert slots.dtype == torch.int32
    assert bank.slots["root"] is None


def test_a_bank_says_what_it_holds() -> None:
    assert "3 projections 7 → 5; root: r=3 × 1, leaf: r=2 × 2" in repr(make())


def test_a_graph_of_the_former_shape_does_not_spoil_gradients_of_the_new_one() -> None:
    bank = make()
    old = sum(bank.part("root", index)[0].sum() for index in range(3))
    bank.grow("root", 4)
    bank.part("root", 0)[0].square().sum().backward()
    assert bank.A["root"].grad is not None
    torch.testing.assert_close(bank.A["root"].grad[0], 2 * bank.A["root"].detach()[0])
    del old
