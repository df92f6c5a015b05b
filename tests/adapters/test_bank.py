from __future__ import annotations

import copy
import gc
import math
import pickle
import sys
import weakref
from types import FrameType
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

import hilora
from hilora import AdapterBank, HiLoRAConfig
from hilora.adapters.factors import Held
from hilora.adapters.injection import banks
from hilora.errors import InvalidValueError
from tests.helpers import random, same

CONFIG = HiLoRAConfig(
    r={"root": 3, "leaf": 2},
    lora_alpha=4,
    tiers=("root", "leaf"),
    slots={"root": 1, "leaf": 2},
    target_modules=("fc",),
)


class Fc(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.fc = nn.Linear(7, 5, dtype=dtype)


def model_of(config: HiLoRAConfig = CONFIG, dtype: torch.dtype = torch.float32, count: int = 3) -> nn.Sequential:
    """Layers 7 → 5, each in a block of its own."""
    model = nn.Sequential(*[Fc(dtype) for _ in range(count)])
    hilora.inject(model, config)
    return model


def make(dtype: torch.dtype = torch.float32, count: int = 3) -> AdapterBank:
    """Their adapters, with random values."""
    (bank,) = banks(model_of(dtype=dtype, count=count))
    fill(bank)
    return bank


def fill(bank: AdapterBank) -> None:
    for seed, tier in enumerate(bank.tiers):
        A, B = bank.A(tier), bank.B(tier)
        bank.assign(tier, random(*A.shape, seed=seed, dtype=A.dtype), random(*B.shape, seed=9 + seed, dtype=B.dtype))


def state(bank: AdapterBank) -> dict[str, Tensor]:
    return {f"{tier}{name}": f(tier).clone() for tier in bank.tiers for name, f in (("A", bank.A), ("B", bank.B))}


def test_fresh_adapters_have_the_shapes_and_change_nothing() -> None:
    (bank,) = banks(model_of())
    assert {t: tuple(bank.A(t).shape) for t in bank.tiers} == {"root": (3, 1, 3, 7), "leaf": (3, 2, 2, 7)}
    assert {t: tuple(bank.B(t).shape) for t in bank.tiers} == {"root": (3, 1, 5, 3), "leaf": (3, 2, 5, 2)}
    assert not any(bank.B(tier).any() for tier in bank.tiers)
    (wide,) = banks(hilora.TieredLoRALinear(nn.Linear(100, 5), r=64))
    A = wide.A("root").detach()
    bound = 1 / math.sqrt(100)  # kaiming_uniform_(a=√5), as in PEFT
    assert A.abs().max() <= bound
    assert A.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_fresh_adapters_come_from_the_seed() -> None:
    bank = make()
    one, two, other = (bank.fresh("leaf", 4, torch.Generator().manual_seed(seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert not torch.equal(one[:, 0], one[:, 1]), "every slot and projection has values of its own"


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_adapters_are_fp32_or_wider(dtype: torch.dtype, wide: torch.dtype) -> None:
    assert {value.dtype for value in state(make(dtype)).values()} == {wide}


def test_one_tier_is_active() -> None:
    model = model_of()
    (bank,) = banks(model)
    assert bank.active == "root"
    bank.activate("leaf")
    assert bank.active == "leaf"
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == [f"{i}.fc.lora_{factor}.leaf" for i in range(3) for factor in "AB"]
    for parameter in bank.parameters("leaf")[:3]:  # FFA-LoRA trains B alone
        parameter.requires_grad_(False)
    assert bank.active == "leaf"
    bank.activate(None)
    assert bank.active is None


def test_what_a_bank_shows_is_a_copy_through_which_gradients_go() -> None:
    bank = make()
    bank.activate("leaf")
    before = bank.A("root")
    assert not before.requires_grad
    with torch.no_grad():
        bank.layers[2].lora_A["root"].fill_(3)
    assert bank.A("root")[2].eq(3).all()
    assert not before.eq(3).any()
    bank.activate("root")
    assert bank.A("root").requires_grad, "a penalty on it reaches the layers"


def apart(bank: AdapterBank) -> list[tuple[str, AdapterBank]]:
    """The same bank, with parameters that something has moved."""
    model = nn.ModuleList(bank.layers)
    found = [
        ("to", copy.deepcopy(model).double().float()),
        ("deepcopy", copy.deepcopy(model)),
        ("pickle", pickle.loads(pickle.dumps(model))),
    ]
    assigned = copy.deepcopy(model)
    assigned.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    replaced = copy.deepcopy(model)
    for parameter in replaced.parameters():
        parameter.data = parameter.data.clone()
    mixed = copy.deepcopy(model)
    mixed[1].double()
    found += [("assign", assigned), ("data", replaced), ("one of them", mixed)]
    return [(name, banks(other)[0]) for name, other in found]


def test_parameters_that_something_moved_are_gathered_and_gradients_reach_them() -> None:
    bank = make()
    for name, other in apart(bank):
        assert same(state(other), state(bank)), name
        loss = (other.A("root") * torch.arange(1.0, 4)[:, None, None, None]).sum()
        loss.backward()
        for index, layer in enumerate(other.layers):
            grad = layer.lora_A["root"].grad
            assert grad is not None, name
            assert grad.eq(index + 1).all(), name
        fill(other)
        other.grow("leaf", 4)
        assert other.A("leaf").shape == (3, 4, 2, 7), name
        assert torch.equal(other.A("leaf")[:, :2], bank.A("leaf")), name


def test_a_pickle_holds_every_adapter_once() -> None:
    sizes = {count: len(pickle.dumps(model_of(HiLoRAConfig(r=8, slots=50, target_modules=("fc",)), count=count)))
             for count in (2, 8)}  # fmt: skip
    assert sizes[8] < 4.5 * sizes[2]


def test_growing_keeps_old_adapters_and_the_parameters() -> None:
    bank = make()
    parameters, before = bank.parameters("leaf"), bank.B("leaf").clone()
    bank.layers[0].lora_B["leaf"].grad = torch.ones_like(bank.layers[0].lora_B["leaf"])
    bank.grow("leaf", 5)
    assert all(one is other for one, other in zip(bank.parameters("leaf"), parameters, strict=True))
    assert bank.layers[0].lora_B["leaf"].shape == (5, 5, 2)
    assert bank.layers[0].lora_B["leaf"].grad is None
    assert torch.equal(bank.B("leaf")[:, :2], before)
    assert not bank.B("leaf")[:, 2:].any()
    assert bank.A("leaf")[:, 2:].any()
    bank.grow("leaf", 3)
    assert bank.slot_count("leaf") == 5, "tables never shrink by growing"


def test_assigning_replaces_a_table() -> None:
    bank = make()
    for slots in (4, 1, 0, 1):
        A, B = random(3, slots, 3, 7, seed=slots), random(3, slots, 5, 3)
        bank.assign("root", A, B)
        assert torch.equal(bank.A("root"), A)
        assert torch.equal(bank.B("root"), B)
        assert bank.slot_count("root") == slots
        assert bank.parameters("root")[0].requires_grad
    A.zero_()
    assert bank.A("root").any(), "values are copied"


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
    before = state(bank)
    for use in (bank.assign, bank.hold):
        with pytest.raises(ValueError, match=r"do not fit tier 'root': expected \[3, S, 3, 7\] and \[3, S, 5, 3\]"):
            use("root", torch.zeros(A), torch.zeros(B))
    assert same(before, state(bank))
    assert not bank.held


def outputs(bank: AdapterBank, x: Tensor, used: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    return torch.stack([(index + 1) * bank.layers[index](x) for index in used]).sum(0)


def test_held_tables_act_in_place_of_the_parameters_and_get_their_gradients() -> None:
    bank = make(torch.float64)
    bank.slots["leaf"] = torch.tensor([1, 0], dtype=torch.int32)
    x = random(4, 7, dtype=torch.float64)
    own = outputs(bank, x)
    A, B = random(3, 4, 2, 7, seed=5, dtype=torch.float64), random(3, 4, 5, 2, seed=6, dtype=torch.float64)
    slot = torch.tensor([3, -1], dtype=torch.int32)
    other = copy.deepcopy(nn.ModuleList(bank.layers))
    (moved,) = banks(other)
    moved.assign("leaf", A, B)
    moved.slots["leaf"] = slot
    moved.activate("leaf")
    want = outputs(moved, x)
    want.square().sum().backward()

    held = A.clone().requires_grad_(), B.clone().requires_grad_()
    bank.hold("leaf", *held, slot)
    bank.activate(None)
    assert bank.active == "leaf"
    assert bank.held["leaf"][0] is held[0]
    assert bank.A("leaf") is held[0]
    for _ in range(2):
        y = outputs(bank, x)
        assert torch.equal(y, want)
        for table, factor in zip(held, ("lora_A", "lora_B"), strict=True):
            (gradient,) = torch.autograd.grad(y.square().sum(), table, retain_graph=True)
            grads = torch.stack([cast(Tensor, getattr(layer, factor)["leaf"].grad) for layer in moved.layers])
            torch.testing.assert_close(gradient, grads, rtol=1e-12, atol=1e-12)
    for copied in (copy.deepcopy(bank.layers[0]), pickle.loads(pickle.dumps(bank.layers[0]))):
        assert torch.equal(copied(x), moved_back(bank)(x)), "copies have the layers' own adapters"
    bank.release()
    assert torch.equal(outputs(bank, x), own)
    bank.hold("leaf", *held, slot)
    bank.assign("leaf", *(factor("leaf") for factor in (moved.A, moved.B)))
    assert torch.equal(bank.A("leaf"), A), "what is assigned is used"
    assert bank.slots["leaf"] is not None
    assert bank.slots["leaf"].tolist() == [1, 0]
    assert not bank.held


def test_held_adapters_can_have_scales_of_their_own() -> None:
    bank, x = make(torch.float64), random(4, 7, dtype=torch.float64)
    A, B = random(3, 2, 2, 7, seed=5, dtype=torch.float64), random(3, 2, 5, 2, seed=6, dtype=torch.float64)
    slot, scales = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([0.25, -3.0])
    scaled = (B * scales[:, None, None]).requires_grad_()
    bank.hold("leaf", A, scaled, slot)
    want = outputs(bank, x)
    (of_scaled,) = torch.autograd.grad(want.square().sum(), scaled)
    B.requires_grad_()
    bank.hold("leaf", A, B, slot, scales=scales)
    found = outputs(bank, x)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), B)[0], of_scaled * scales[:, None, None])
    with torch.no_grad():
        torch.testing.assert_close(outputs(bank, x), want)
        bank.hold("leaf", A, B, slot)
        assert not torch.allclose(outputs(bank, x), want), "what was used before is not used again"


def test_what_is_read_of_held_adapters_has_their_scales() -> None:
    bank, scales = make(torch.float64), torch.tensor([0.25, -3.0])
    A, B = random(3, 2, 2, 7, seed=5, dtype=torch.float64), random(3, 2, 5, 2, seed=6, dtype=torch.float64)
    bank.hold("leaf", A, B)
    want = bank.layers[0].delta_weight({"leaf": 1}) - bank.layers[0].delta_weight({"leaf": -1})
    bank.hold("leaf", A, B, scales=scales)
    found = bank.layers[0].delta_weight({"leaf": 1}) - bank.layers[0].delta_weight({"leaf": -1})
    torch.testing.assert_close(found, -3 * want)
    table = bank.table("leaf")
    assert table.scale is not None
    assert torch.equal(table.scale, scales)
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float64)):
        with pytest.raises(InvalidValueError, match=r"expected fp32 \[2\]"):
            bank.hold("leaf", A, B, scales=wrong)


def test_growing_keeps_the_scales_of_what_was_held() -> None:
    bank, x = make(torch.float64), random(4, 7, dtype=torch.float64)
    A, B = random(3, 2, 2, 7, seed=5, dtype=torch.float64), random(3, 2, 5, 2, seed=6, dtype=torch.float64)
    slot = torch.tensor([1, 0], dtype=torch.int32)
    bank.hold("leaf", A, B, slot, scales=torch.tensor([0.25, -3.0]))
    want = outputs(bank, x)
    bank.grow("leaf", 3)
    assert not bank.held
    bank.slots["leaf"] = slot
    torch.testing.assert_close(outputs(bank, x), want)


def test_what_lies_beyond_a_rank_is_not_in_a_table() -> None:
    bank = make()
    A, B = random(3, 2, 2, 7, seed=5), random(3, 2, 5, 2, seed=6)
    for held in (False, True):
        if held:
            bank.hold("leaf", A, B, None, torch.tensor([1, 2], dtype=torch.int32))
        else:
            bank.assign("leaf", A, B, torch.tensor([1, 2]))
        table = bank.table("leaf")
        assert table.rank.tolist() == [1, 2]
        assert not table.A[0][0, :, 1:].any()
        assert not table.B[0][0, ..., 1:].any()
        assert torch.equal(table.A[0][1], A[:, 1])


def test_nothing_of_a_step_or_of_former_tables_is_kept() -> None:
    bank, x = make(), random(4, 7)
    bank.slots["leaf"] = torch.tensor([0], dtype=torch.int32)
    for tier in bank.tiers:
        bank.hold(tier, bank.A(tier).detach().requires_grad_(tier == "root"), bank.B(tier).detach(), bank.slots[tier])
    A = bank.held["root"][0]
    for _ in range(3):
        y = outputs(bank, x)
        node: Any = get_gradient_edge(A).node
        assert "an earlier step" not in node.metadata
        node.metadata["an earlier step"] = True
        y.sum().backward()
        del y, node
    former = weakref.ref(A)
    bank.hold("root", A.detach().clone(), bank.B("root"))
    del A
    gc.collect()
    assert former() is None


def moved_back(bank: AdapterBank) -> nn.Module:
    (layer, *_) = copy.deepcopy(nn.ModuleList(bank.layers))
    return layer


def test_tables_with_a_history_can_be_held() -> None:
    bank = make(torch.float64)
    x = random(4, 7, dtype=torch.float64)
    bank.slots["leaf"] = torch.tensor([0], dtype=torch.int32)
    leaf = random(3, 1, 3, 7, dtype=torch.float64).requires_grad_()
    bank.hold("root", 2 * leaf, bank.B("root").detach())
    (through,) = torch.autograd.grad(outputs(bank, x).square().sum(), leaf)
    direct = (2 * leaf).detach().requires_grad_()
    bank.hold("root", direct, bank.B("root").detach())
    torch.testing.assert_close(through, 2 * torch.autograd.grad(outputs(bank, x).square().sum(), direct)[0])


def part(held: Held, index: int) -> tuple[Tensor, Tensor]:
    (found,) = held.parts(index, [held.B.shape[2]])
    return found


def test_a_forward_pass_takes_held_tables_apart_once() -> None:
    bank = make(count=8)
    bank.hold("root", bank.A("root").detach().requires_grad_(), bank.B("root").detach())
    held = bank.shared.held["root"]
    nodes = {part(held, index)[0].grad_fn for index in range(8)}
    assert len(nodes) == 1, "each part of its own would write a gradient of the whole table"
    again = {part(held, index)[0].grad_fn for index in range(8)}
    assert len(again) == 1
    assert not again & nodes, "forward passes share no node"


def test_another_thread_may_take_the_same_part_at_any_time() -> None:
    A, B = random(3, 1, 3, 7).requires_grad_(), random(3, 1, 5, 3)
    held, taken, before = Held(A, B), [], sys.gettrace()

    def in_between(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and frame.f_code is Held._part.__code__:
            taken.append(part(held, 1)[0])  # which is not traced
        return in_between

    try:
        sys.settrace(in_between)
        taken += [part(held, 1)[0] for _ in range(3)]
    finally:
        sys.settrace(before)
    assert len({id(view) for view in taken}) == len(taken) > 6, "each is handed out once"
    (found,) = torch.autograd.grad(torch.stack([view.sum() for view in taken]).sum(), A)
    assert found[1].eq(len(taken)).all()
    assert not found[[0, 2]].any()


def gradient(bank: AdapterBank, used: tuple[int, ...]) -> Tensor:
    table = bank.held["root"][1]
    held = bank.shared.held["root"]
    losses = [(index + 1) * part(held, index)[1].square().sum() for index in used]
    return torch.autograd.grad(torch.stack(losses).sum(), table)[0]


def test_parts_follow_every_change_of_what_is_held() -> None:
    """Each change comes in the middle of a forward pass, when other parts have been handed out."""
    bank = make()
    B = random(3, 1, 5, 3).requires_grad_()
    bank.hold("root", bank.A("root").detach(), B)

    def step() -> None:
        B.grad = torch.ones_like(B)
        torch.optim.SGD([B], lr=0.1).step()

    def without_grad() -> None:
        with torch.no_grad():
            assert part(bank.shared.held["root"], 1)[1].grad_fn is None

    def frozen() -> None:
        B.requires_grad_(False)
        assert not part(bank.shared.held["root"], 1)[1].requires_grad
        B.requires_grad_(True)

    for change in (
        step,
        without_grad,
        frozen,
        lambda: gradient(bank, (1,)),
        lambda: bank.hold("root", bank.A("root"), random(3, 1, 5, 3, seed=4).requires_grad_()),
    ):
        part(bank.shared.held["root"], 0)
        change()
        for used in ((1, 2, 0), (2, 0), (1, 1, 1)):
            now = bank.held["root"][1].detach()
            count = torch.tensor([used.count(i) * (i + 1) for i in range(3)])[:, None, None, None]
            torch.testing.assert_close(gradient(bank, used), 2 * count * now)


def test_without_gradients_every_change_of_what_is_held_counts() -> None:
    """Tiers are kept from call to call: not their values, nor which slots are meant, nor that x fits."""
    bank = make(torch.float64)
    layer = bank.layers[1]
    x = random(2, 4, 7, dtype=torch.float64)
    tables = {t: [random(*f(t).shape, dtype=torch.float64) for f in (bank.A, bank.B)] for t in bank.tiers}
    slot = torch.tensor([0, 1], dtype=torch.int32)

    def hold() -> None:
        for tier, (A, B) in tables.items():
            bank.hold(tier, A, B, slot if tier == "leaf" else None)

    def outputs() -> tuple[Tensor, Tensor, Tensor]:
        """Without and with gradients, and with tiers that are put together anew."""
        with torch.no_grad():
            kept = layer(x)
        trained = layer(x).detach()
        bank.shared.used.clear()
        return kept, trained, layer(x).detach()

    hold()
    A, B = tables["leaf"]
    A.requires_grad_()
    before, trained, want = outputs()
    torch.testing.assert_close(before, want)
    torch.testing.assert_close(trained, want)

    def more_slots() -> None:
        for table in (A, B):
            table.data = random(3, 4, *table.shape[2:], seed=6, dtype=torch.float64)

    for change in (
        lambda: B.data.mul_(3),
        lambda: slot.copy_(torch.tensor([1, 0])),
        lambda: slot.data.fill_(-1),
        lambda: slot.copy_(torch.tensor([1, 1])),
        lambda: setattr(A, "data", random(*A.shape, seed=2, dtype=torch.float64)),
        more_slots,
        lambda: bank.hold("leaf", A, random(*B.shape, seed=3, dtype=torch.float64), slot),
        bank.release,
    ):
        change()
        bank.slots["leaf"] = slot
        found, trained, want = outputs()
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(trained, want)
        assert not torch.equal(found, before), "the change has an effect"
        before = found
    hold()
    with torch.no_grad(), pytest.raises(InvalidValueError):
        layer(x[..., :3])
    with torch.no_grad(), pytest.raises(InvalidValueError):
        layer(x[:1])


def test_functional_call_and_transforms_see_the_parameters_they_were_given() -> None:
    model = model_of(dtype=torch.float64)
    (bank,) = banks(model)
    fill(bank)
    bank.slots["leaf"] = torch.tensor([0, 1], dtype=torch.int32)
    x = random(4, 7, dtype=torch.float64)
    layer = bank.layers[1]
    own = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return y.square().sum()

    layer(x).square().sum().backward()
    wanted = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    assert set(wanted) == {"lora_A.root", "lora_B.root"}
    by_func = torch.func.grad(loss)(own)
    for name, grad in wanted.items():
        torch.testing.assert_close(by_func[name], grad)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in own.items()}
    each = torch.func.vmap(loss)(stacked)
    torch.testing.assert_close(each[0], loss(own))
    torch.testing.assert_close(each[1], loss({name: 2 * value for name, value in own.items()}))


def test_slots_move_with_the_adapters_and_stay_integers() -> None:
    model = model_of()
    (bank,) = banks(model)
    bank.slots["leaf"] = torch.tensor([1, 0], dtype=torch.int32)
    model.double().to("meta")
    slots = bank.slots["leaf"]
    assert slots is not None
    assert slots.device.type == "meta"
    assert slots.dtype == torch.int32
    assert bank.slots["root"] is None


def test_a_composition_weighs_the_tiers_of_each_projection() -> None:
    bank = make(torch.float64)
    bank.slots["leaf"] = torch.tensor([0], dtype=torch.int32)
    x = random(4, 7, dtype=torch.float64)
    seen = []

    def composition(position: int, x: Tensor) -> dict[str, float | Tensor]:
        seen.append(position)
        return {"root": 0.5, "leaf": torch.full(x.shape[:-1], 2.0, dtype=x.dtype)}

    plain = copy.deepcopy(nn.ModuleList(bank.layers))
    bank.composition = composition
    assert bank.composition is composition
    y = outputs(bank, x)
    assert seen == [0, 1, 2]
    (other,) = banks(plain)
    other.assign("root", other.A("root"), 0.5 * other.B("root"))
    other.assign("leaf", other.A("leaf"), 2 * other.B("leaf"))
    torch.testing.assert_close(y, outputs(other, x))
    bank.composition = None
    assert not torch.allclose(outputs(bank, x), y)


def test_a_bank_says_what_it_holds() -> None:
    assert "3 projections 7 → 5; root: r=3 × 1, leaf: r=2 × 2" in repr(make())
