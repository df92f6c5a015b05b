"""Two of eight clients attack in every round: the plain mean is ruined, the robust ones are not."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.poisoned_clients import attacked
from hilora.models.backbone import Backbone
from tests.federated.conftest import Simulate, records, same

pytestmark = pytest.mark.slow
ROUNDS = [4, 1, 0]


@cache
def plain(strategy: str, out: Path) -> float:
    """The accuracy where nobody attacks."""
    run = attacked(strategy, "none", "nobody", out, rounds=ROUNDS)
    assert run is not None
    return float(run["final"]["mean"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plain")


@pytest.mark.parametrize("attack", ["reversed", "random"])
@pytest.mark.parametrize("strategy", ["fedit", "hilora"])
def test_a_plain_mean_is_ruined_and_robust_ones_are_not(
    strategy: str, attack: str, tmp_path: Path, folder: Path
) -> None:
    reached = {}
    for robust in ("none", "clip", "trimmed", "median"):
        run = attacked(strategy, robust, attack, tmp_path / robust, rounds=ROUNDS)
        reached[robust] = run["final"]["mean"] if run else 0.0
    unharmed = plain(strategy, folder / strategy)
    assert unharmed > 0.3
    assert reached["none"] < 0.1 * unharmed
    for robust in ("clip", "trimmed", "median"):
        assert reached[robust] > 0.3 * unharmed, reached


@pytest.mark.parametrize("strategy", ["fedit", "hilora"])
def test_other_labels_move_a_robust_mean_little(strategy: str, tmp_path: Path, folder: Path) -> None:
    run = attacked(strategy, "median", "labels", tmp_path / "median", rounds=ROUNDS)
    assert run is not None
    assert run["final"]["mean"] > 0.6 * plain(strategy, folder / strategy)


@pytest.mark.parametrize("robust", ["clip", "trimmed", "median"])
def test_who_trains_together_changes_robust_means_by_rounding_alone(
    simulate: Simulate, backbone: Backbone, double: None, tmp_path: Path, robust: str
) -> None:
    """Clients one by one and all at once, some of them without images."""
    backbone.model.double()
    options: dict[str, Any] = {"robust": robust, "sizes": [0, 9, 12, 5, 1, 7, 7], "rounds": [2, 1, 0]}
    alone, together = (simulate(out=tmp_path / str(n), clients_at_once=n, **options) for n in (1, None))
    alone.run(), together.run()
    assert [record["test"] for record in records(alone)] == [record["test"] for record in records(together)]
    everyone = torch.arange(7)
    a, b = alone.models(everyone), together.models(everyone)
    for tier, rows in a.tiers.items():
        assert same(b.tiers[tier].taken(), rows.taken(), 1e-7)
    assert same(b.head.taken(), a.head.taken(), 1e-7)
