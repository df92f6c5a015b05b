"""What a deployment is told, in a flat table of texts and numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hilora.errors import InvalidValueError
from hilora.federated.deploy.settings import asked

LEAST: dict[str, Any] = {"clients": 8, "classes": 10, "backbone": "glyph_vit"}


def test_settings_of_all_kinds_stand_in_one_table() -> None:
    found = asked(
        LEAST
        | {"rounds": "4,6,4", "rank": "16,8,4", "lr": 0.001, "target-modules": "q,v", "gamma-root": 0.2, "out": "there"}
        | {"partition": "sc-dir", "images-per-client": 96, "weights": "", "groups": "kmeans"}
    )
    assert found.training.rounds == {"root": 4, "cluster": 6, "leaf": 4}
    assert found.training.rank == {"root": 16, "cluster": 8, "leaf": 4}
    assert set(found.training.lr.values()) == {0.001}
    assert found.training.target_modules == ("q", "v")
    assert found.strategy.settings.plain() | {"gamma_root": 0.2, "groups": "kmeans"} == found.strategy.settings.plain()
    assert found.run.out == Path("there")
    assert found.run.weights is None
    assert found.partition is not None
    assert (found.partition.clients, found.partition.unseen) == (8, 0.0)  # type: ignore[attr-defined]


def test_classes_are_a_number_or_names() -> None:
    assert asked(LEAST).run.class_names == tuple("0123456789")
    assert asked(LEAST | {"classes": "10"}).run.class_names == tuple("0123456789")
    assert asked(LEAST | {"classes": "cat, dog"}).run.class_names == ("cat", "dog")
    with pytest.raises(InvalidValueError, match="expected names that differ"):
        asked(LEAST | {"classes": "cat,cat"}).run.class_names  # noqa: B018


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"round": "1"}, "there is no setting round: expected some of .*rounds"),
        ({"k": 3}, "there is no setting k"),  # of another strategy
        ({"alpha": 3}, "there is no setting alpha"),  # of a partition, where there is none
        ({"strategy": "fedavg"}, "unknown strategy 'fedavg'"),
        ({"strategy": "central"}, "strategy='central' has all images in one place: it cannot be deployed"),
        ({"partition": "halves"}, "partition='halves': expected one of"),
        ({"min-clients": 9}, "min-clients=9: there are 8 clients at most"),
        ({"clients": ""}, "clients"),
        ({"deadline": 0}, "deadline=0"),
        ({"rounds": "1,2"}, "give one value, or one for each of root, cluster, leaf"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidValueError, match=said):
        asked(LEAST | change)
