"""The figures of every round as scalars for TensorBoard."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hilora.errors import needed
from hilora.federated.callbacks.base import Callback, Round

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

    from hilora.federated.simulation import Simulation


class TensorBoard(Callback):
    """Writes the numbers of a round's record as scalars into the run's folder: `loss`, `test/mean`, `val/tail`, …; the
    steps are rounds. Of a run that goes on, no round is there twice.

    Raises:
        ResourceError: tensorboard is not installed.
    """

    name = "tensorboard"
    _writer: SummaryWriter | None = None

    def __init__(self) -> None:
        with needed("TensorBoard", "tensorboard"):
            from torch.utils.tensorboard import SummaryWriter
        self._open = SummaryWriter

    def begin(self, simulation: Simulation) -> None:
        # from this round on, TensorBoard forgets what an earlier file has: a round that was stopped does not count
        self._writer = self._open(str(simulation.out), purge_step=simulation.round + 1)

    def commit(self, simulation: Simulation, round: Round) -> None:
        assert self._writer is not None
        for name, value in scalars(round.record):
            self._writer.add_scalar(name, value, round.record["round"])
        self._writer.flush()

    def end(self, simulation: Simulation) -> None:
        if self._writer is not None:
            self._writer.close()


def scalars(record: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record, those of a table inside of it as `table/name`; but for the round's own."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{above}{name}/")
        elif isinstance(value, int | float) and name not in ("round", "round_in_stage"):
            yield above + name, value
