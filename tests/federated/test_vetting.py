"""Messages that cannot be used, each for one reason, and the run goes on without them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hilora.adapters.table import AdapterTable
from hilora.errors import InvalidValueError
from hilora.federated.protocol import Download, Head, Stage, Upload, shared
from hilora.federated.strategies import STRATEGIES
from hilora.federated.strategies.fedit import FedIT
from hilora.federated.vetting import vet
from tests.federated.conftest import Simulate, records
from tests.federated.strategies.by_hand import SEEN, Halves

CLIENTS = torch.tensor([4, 7, 9])


def table(rows: int = 1, value: float = 0.0, r: int = 2) -> AdapterTable:
    return AdapterTable([torch.full((rows, 3, r, 5), value)], [torch.full((rows, 3, 6, r), value)])


def head(rows: int = 1, value: float = 0.0) -> Head:
    return Head(torch.full((rows, 4, 6), value), torch.full((rows, 4), value))


ONE = torch.zeros(1, dtype=torch.long)
EXPECTED = Upload(ONE, ONE, {"root": table()}, head())


def message(**changes: Any) -> Upload:
    sent = Upload(CLIENTS, torch.tensor([5, 0, 7]), {"root": table(3, 1.0)}, head(3, 1.0))
    return replace(sent, **changes)


def spoilt(change: Callable[[Tensor], Any]) -> dict[str, AdapterTable]:
    """A table whose A was changed in place."""
    found = table(3, 1.0)
    change(found.A[0])
    return {"root": found}


def test_what_was_asked_for_is_taken() -> None:
    assert vet(message(), EXPECTED) == [None] * 3
    assert vet(message().rows(torch.tensor([1])), EXPECTED) == [None]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tiers": {}}, "it has head, expected root, head"),
        ({"tiers": {"leaf": table(3)}}, "it has leaf, head, expected root, head"),
        ({"head": None}, "it has root, expected root, head"),
        ({"tiers": {"root": table(3).only("A")}}, "root has 0.lora_A, rank, expected 0.lora_A, 0.lora_B, rank"),
        (
            {"tiers": {"root": table(3, r=1)}},
            r"root.0.lora_A is .* \[3, 3, 1, 5\], expected .* \[3, 3, 2, 5\]",
        ),
        ({"tiers": {"root": table(2)}}, r"root.0.lora_A is torch.float32 \[2, 3, 2, 5\], expected .* \[3, 3, 2, 5\]"),
        (
            {"tiers": {"root": table(3).each(Tensor.double)}},
            r"root.0.lora_A is torch.float64 .* torch.float32",
        ),
        ({"head": head(3).each(Tensor.half)}, r"head.weight is torch.float16 .* expected torch.float32"),
        ({"images": torch.ones(3)}, r"images is torch.float32 \[3\], expected int64 \[3\]"),
        ({"images": torch.ones(2).long()}, r"images is torch.int64 \[2\], expected int64 \[3\]"),
        ({"choice": torch.zeros(3).long()}, "it names a choice, expected none"),
    ],
)
def test_a_layout_that_was_not_asked_for_is_no_clients(changes: dict[str, Any], reason: str) -> None:
    found = vet(message(**changes), EXPECTED)
    assert len(found) == 3
    for said in found:
        assert said is not None
        with pytest.raises(ValueError, match=f"^{reason}"):
            raise ValueError(said)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_left_out(value: float) -> None:
    assert vet(message(tiers=spoilt(lambda A: A[1, 2, 0, 3].fill_(value))), EXPECTED) == [
        None,
        "root is not finite",
        None,
    ]
    broken = head(3)
    broken.bias[2, 0] = value
    assert vet(message(head=broken), EXPECTED, Download(Stage("root", 1, "root")), 1e9)[2] == "head is not finite"


def test_ranks_counts_and_choices_have_their_bounds() -> None:
    ranks = AdapterTable(table(3).A, table(3).B, torch.tensor([2, -1, 0]))
    assert vet(message(tiers={"root": ranks}), EXPECTED) == [None, "root has a rank beyond 2", None]
    assert vet(message(images=torch.tensor([1, 1, -4])), EXPECTED)[2] == "a negative number of images"
    chosen = replace(EXPECTED, choice=ONE + 1)
    found = vet(message(choice=torch.tensor([1, 2, -1])), chosen)
    assert found == [None, "a choice that is none of 2", "a choice that is none of 2"]
    assert vet(message(), chosen) == ["it names no choice, expected one"] * 3


def test_the_norm_is_that_of_all_that_was_changed() -> None:
    sent = Download(Stage("root", 1, "root"), {"root": shared(table(1, 1.0), CLIENTS)}, shared(head(1, 1.0), CLIENTS))
    upload = message()
    assert upload.head is not None
    upload.head.bias[1] += 1.5  # four numbers: a norm of 3
    upload.tiers["root"].B[0][1, 0, 0, 0] -= 4.0  # and of 5 together
    assert vet(upload, EXPECTED, sent, 5.01) == [None] * 3
    assert vet(upload, EXPECTED, sent, 4.99) == [None, "its change has a norm of 5, more than 4.99", None]
    assert vet(upload, EXPECTED, Download(sent.stage), 1.0)[0] is not None  # nothing was sent: all of it counts


@pytest.mark.parametrize("name", [name for name, kind in STRATEGIES.items() if kind.travels])
def test_every_method_says_what_its_clients_send(name: str) -> None:
    halves = Halves(name, rounds=[1, 1, 1])
    for number, stage in enumerate(halves.stages):
        halves.begin(number)
        sent = halves.server.configure(stage, SEEN).at(1)
        upload = halves.ask(SEEN, sent)
        assert vet(upload, halves.server.expected(sent.stage), sent, 1e9) == [None] * 6
        halves.server.aggregate(stage, upload)


class Mute(FedIT):
    """Whose clients send something else than it says."""

    def local(self, *args: Any) -> Upload:
        return replace(super().local(*args), head=None)


def test_a_method_that_does_not_say_what_its_clients_send_is_an_error(simulate: Simulate) -> None:
    with pytest.raises(InvalidValueError, match=r"it has root, expected root, head; its `sends` says what they send"):
        simulate(Mute, rounds=[1, 0, 0]).run()


@pytest.mark.parametrize(
    ("strategy", "who"),
    [("fedit", [1]), ("fedit", [0, 1, 2, 3, 4]), ("hilora", [0, 3]), ("ifca", [1]), ("fedalt", [0, 1, 2, 3, 4])],
)
def test_a_run_goes_on_without_who_sends_too_much(simulate: Simulate, strategy: str, who: list[int]) -> None:
    simulation = simulate(strategy, rounds=[2, 0, 0], update_bound=1e4)
    local = simulation.client.local

    def sent(*args: Any) -> Upload:
        upload = local(*args)
        evil = torch.isin(upload.clients, torch.tensor(who))
        large = {tier: rows.each(lambda value: value + 1e5).where(evil, rows) for tier, rows in upload.tiers.items()}
        return replace(upload, tiers=large)

    setattr(simulation.client, "local", sent)  # noqa: B010
    simulation.run()
    for record in records(simulation):
        assert list(record["left_out"]) == [str(client) for client in who]
        assert "more than 10000" in record["left_out"][str(who[0])]
    server: Any = simulation.server
    held = server.uploaded if strategy == "fedalt" else server.root
    assert max(float(value.abs().max()) for value in held.tensors().values()) < 1e4
