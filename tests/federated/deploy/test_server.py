"""A deployment gives the simulation's numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from hilora.federated.strategies import STRATEGIES
from tests.federated.conftest import records
from tests.federated.deploy.conftest import Make
from tests.federated.deploy.rounding import close

METHODS = [name for name, kind in STRATEGIES.items() if kind.travels]


@pytest.mark.parametrize("method", METHODS)
def test_a_deployment_gives_the_simulations_numbers(world: Make, tmp_path: Path, method: str) -> None:
    there = world(strategy=method, unseen=0.25, unseen_epochs=1)
    deployed, simulated = there.deployment(), there.simulation(tmp_path / "simulated")
    summary, expected = deployed.run(), simulated.run()
    close(deployed.server.state_dict(), simulated.server.state_dict())
    assert summary["per_client"].keys() == expected["per_client"].keys()
    for name, values in expected["per_client"].items():
        assert summary["per_client"][name] == pytest.approx(values, nan_ok=True), name
    assert summary["unseen"] == pytest.approx(expected["unseen"])
    assert summary["tiers"].keys() == expected["tiers"].keys()
    assert summary["communication"]["up"] == expected["communication"]["up"]
    for mine, other in zip(records(deployed), records(simulated), strict=True):
        assert mine["val"] == pytest.approx(other["val"])
        assert (mine["clients"], mine["stage"]) == (other["clients"], other["stage"])
