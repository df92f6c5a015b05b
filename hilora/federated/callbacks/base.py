"""What a callback is: something that looks at a training, measures, or writes, without being part of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from hilora.federated.engine.trainer import Effort
from hilora.federated.protocol import Stage

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation


@dataclass
class Round:
    """A round that was just trained.

    Attributes:
        stage: the stage that it belongs to.
        last: whether it was the last one of the stage.
        record: what `metrics.jsonl` will say of it; callbacks add to it while they measure.
        efforts: what the clients' trainings were.
    """

    stage: Stage
    last: bool
    record: dict[str, Any]
    efforts: Sequence[Effort] = ()


class Callback:
    """Hooks of a simulation; each does nothing here.

    Attributes:
        name: what its state and its part of the summary are kept under.
    """

    name: ClassVar[str] = ""

    def begin(self, simulation: Simulation) -> None:
        """Before the first round, or the first one after resuming."""

    def stage_begun(self, simulation: Simulation, stage: Stage) -> None:
        """Before the first round of a stage, once the strategy is ready for it."""

    def measure(self, simulation: Simulation, round: Round) -> None:
        """After a round, before it counts. It may take long, and be interrupted."""

    def commit(self, simulation: Simulation, round: Round) -> None:
        """The round counts: take in and write what was measured. It is not interrupted."""

    def trained(self, simulation: Simulation) -> None:
        """After the last round of the last stage."""

    def saved(self, simulation: Simulation) -> None:
        """The simulation has reached a point to go on from."""

    def end(self, simulation: Simulation) -> None:
        """The run is over, or was stopped after its last round that counts."""

    def summary(self, simulation: Simulation) -> Mapping[str, Any]:
        """What the callback adds to `summary.json`."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What must be known to go on: tensors, numbers, texts, and dicts and lists of these."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
