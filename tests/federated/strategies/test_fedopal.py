"""FedOPAL: what is averaged, and a penalty that moves both adapters."""

from __future__ import annotations

from typing import Any

import torch

from hilora.federated.local.sgd import LocalSGD
from hilora.federated.strategies.fedopal import KeptApart
from hilora.models.backbone import Backbone
from tests.federated.conftest import same
from tests.federated.engine.test_batched import IMAGES, make, some_models, task, train
from tests.federated.strategies.by_hand import UNSEEN, Halves, each, everywhere


def test_the_global_adapter_is_averaged_and_the_personal_one_stays() -> None:
    halves = Halves("fedopal", orthogonality=0.3)
    A = halves.server.root.A[0].clone()
    halves.one_round()
    (call,) = halves.calls
    assert call.tier == "root"
    assert call.how["algorithm"] == KeptApart(also=("leaf",), rates="root", weight=0.3, tiers=("root", "leaf"))
    everywhere(halves.server.root.B[0], 3.5)
    torch.testing.assert_close(halves.server.root.A[0], A + 3.5)
    each(halves.B("leaf"), [1, 2, 3, 4, 5, 6, 0, 0])
    each(halves.bias(), [1, 2, 3, 4, 5, 6, 0, 0])
    halves.personalised(UNSEEN)
    assert (halves.calls[-1].tier, halves.calls[-1].how["penalty"]) == ("leaf", {"root": 0.3})


def test_both_adapters_have_the_gradient_of_the_overlap(backbone: Backbone, double: None) -> None:
    """Of a step from the task's gradient alone: a weight γ adds 2 γ B' B'ᵀ B to that of B, and likewise to B'."""
    backbone.model.double()
    torch.manual_seed(0)
    engine = make(backbone, lr=1e-3)
    models = some_models(engine)
    start = {tier: models.tiers[tier].taken() for tier in ("root", "leaf")}
    plain, apart = LocalSGD(also=("leaf",)), KeptApart(also=("leaf",), weight=0.7)
    found: dict[str, list[Any]] = {}
    for name, algorithm in (("plain", plain), ("apart", apart)):
        gradients: list[Any] = []
        bench = engine._prepared(IMAGES, models, task("root", algorithm=algorithm), None)

        def noted(values: Any, *more: Any, kept: list[Any] = gradients) -> None:
            kept.append([value.clone() for value in values])

        bench.training.optimiser.step = noted  # type: ignore[attr-defined]
        bench.training.begin(torch.ones(4))
        bench.training.step(torch.zeros_like(bench.pixels), torch.zeros(bench.pixels.shape[:2], dtype=torch.long))
        names = [one.parameter for one in (*bench.trained, *bench.factors("leaf", "AB", 0.1))]
        assert len(gradients[0]) == len(names)
        found[name] = gradients[0]
    difference = [a - b for a, b in zip(found["apart"], found["plain"], strict=True)]
    ((_, root_B),), ((_, leaf_B),) = start["root"].factors, start["leaf"].factors
    root_A_gained, root_B_gained, *heads, leaf_A_gained, leaf_B_gained = difference
    expected_root = 2 * 0.7 * leaf_B @ (leaf_B.mT @ root_B)
    expected_leaf = 2 * 0.7 * root_B @ (root_B.mT @ leaf_B)
    torch.testing.assert_close(root_B_gained.transpose(0, 1), expected_root)
    torch.testing.assert_close(leaf_B_gained.transpose(0, 1), expected_leaf)
    assert all(not other.any() for other in (root_A_gained, leaf_A_gained, *heads))


def test_together_is_the_same_as_one_by_one_and_the_overlap_falls(backbone: Backbone, double: None) -> None:
    backbone.model.double()
    torch.manual_seed(0)
    together, alone = (make(backbone, clients_at_once=size) for size in (4, 1))
    models = some_models(together)
    a, b, c = (
        train(engine, task("root", algorithm=KeptApart(also=("leaf",), weight=weight)), models)
        for engine, weight in ((together, 5.0), (alone, 5.0), (together, 0.0))
    )
    assert all(same(a.tiers[tier], b.tiers[tier], 1e-9) for tier in ("root", "leaf"))
    trained = [0, 1, 3]  # the third client has no images

    def overlap(found: Any) -> float:
        return float((found.tiers["root"].B[0].mT @ found.tiers["leaf"].B[0])[trained].square().sum())

    assert overlap(a) < overlap(c)
    plain = train(together, task("root", algorithm=LocalSGD(also=("leaf",))), models)
    assert all(same(c.tiers[tier], plain.tiers[tier], 1e-12) for tier in ("root", "leaf"))
