"""What a client keeps from message to message, for itself alone: its private state, and what it was sent last."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hilora.adapters.table import Stack
from hilora.errors import FileError
from hilora.federated.archive import packed, unpacked
from hilora.federated.client import ClientStore
from hilora.federated.deploy.messages import Errand
from hilora.files import write_bytes


@dataclass
class Private:
    """A client in a run of a method.

    What one method keeps to itself another may send: the state is for the method that it is of, whatever a server says.

    Attributes:
        store: the private state, of this client alone.
        held: parts of downloads, as they were sent last.
        before: the private state before the last training, and `last` what that was: when the server asks for the same
            once more, since it has not seen the answer, or went back to a checkpoint, the client goes back as well.
    """

    client: int
    run: str
    method: str
    store: ClientStore = field(init=False)
    held: dict[str, Stack] = field(default_factory=dict)
    before: dict[str, Any] = field(default_factory=lambda: {"tables": {}, "has": {}})
    last: Errand | None = None

    def __post_init__(self) -> None:
        self.store = ClientStore(1, self.client)

    def begin(self, errand: Errand) -> None:
        """A training begins."""
        if errand == self.last:
            self.store.load_state_dict(_apart(self.before))
        self.before, self.last = _apart(self.store.state_dict()), errand

    def to_bytes(self) -> bytes:
        """All of it as the bytes of a safetensors file."""
        last = None if self.last is None else self.last.model_dump()
        return packed(
            {
                "client": self.client,
                "run": self.run,
                "method": self.method,
                "store": self.store.state_dict(),
                "held": self.held,
                "before": self.before,
                "last": last,
            }
        )

    @classmethod
    def of_bytes(cls, data: bytes, client: int, run: str, method: str) -> Private:
        """What `to_bytes` gave.

        Raises:
            FileError: it is damaged, or of another client, run or method.
        """
        tree = unpacked(data)
        try:
            known = (tree["client"], tree["run"], tree["method"])
            if known != (client, run, method):
                said = "client {} in run {} of {}"
                raise FileError(
                    f"a private state is of {said.format(*known)}, expected {said.format(client, run, method)}"
                )
            found = cls(client, run, method, tree["held"])
            found.store.load_state_dict(tree["store"])
            found.before, last = tree["before"], tree["last"]
            found.last = None if last is None else Errand.model_validate(last)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileError(f"this is no private state of a client: {error!r}") from error
        return found


def _apart(state: dict[str, Any]) -> dict[str, Any]:
    """A copy that later writes do not reach."""
    return {
        "tables": {name: table.each(lambda tensor: tensor.clone()) for name, table in state["tables"].items()},
        "has": {name: has.clone() for name, has in state["has"].items()},
    }


def private_file(folder: Path, client: int, run: str) -> Path:
    """Where a client has its state of a run. Every run has its own: a new one takes nothing from those before it."""
    return folder / f"client-{client}.run-{run}.safetensors"


def load_private(folder: Path, client: int, run: str, method: str) -> Private:
    """The client's state of a run; a new one, if there is none yet.

    Raises:
        FileError: the file is damaged, or of another method.
    """
    path = private_file(folder, client, run)
    if not path.is_file():
        return Private(client, run, method)
    return Private.of_bytes(path.read_bytes(), client, run, method)


def save_private(folder: Path, private: Private) -> None:
    """Write the client's state, whole or not at all."""
    write_bytes(private_file(folder, private.client, private.run), private.to_bytes())
