"""The post: what was moved between the server and each client, in bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from hilora.adapters.table import Stack
from hilora.federated.protocol import Download, Part, Upload


class Post:
    """Counts the messages of N clients. A client keeps what it was sent last of every part of a download, and is not
    sent it again as long as it is the same.

    Attributes:
        up: bytes that each client sent, int64 `[N]`.
        down: bytes that each was sent.
    """

    def __init__(self, clients: int) -> None:
        self.clients = clients
        self.up, self.down = torch.zeros(clients, dtype=torch.long), torch.zeros(clients, dtype=torch.long)
        self.held: dict[str, Tensor] = {}  # of each part, a digest of what each client has [N]

    def send(self, clients: Tensor, download: Download) -> None:
        """The clients `[n]` get what they do not have."""
        for part in download.counted():
            held = self.held.setdefault(part.name, torch.zeros(self.clients, dtype=torch.long))
            found = digests(part)
            self.down[clients] += torch.where(held[clients] == found, 0, part.nbytes())
            held[clients] = found

    def held_by(self, client: int) -> dict[str, int]:
        """The digests of what a client holds, by the names of the parts."""
        return {name: int(held[client]) for name, held in self.held.items()}

    def forget(self, client: int) -> None:
        """A client holds nothing any more, or nobody knows what it holds."""
        for held in self.held.values():
            held[client] = 0

    def receive(self, upload: Upload) -> None:
        """The clients' messages arrive."""
        self.up[upload.clients] += upload.nbytes()

    def state_dict(self) -> dict[str, Any]:
        return {"up": self.up, "down": self.down, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.up, self.down, self.held = state["up"], state["down"], dict(state["held"])


def digests(part: Part) -> Tensor:
    """A number for the contents of each client's row, int64 `[n]`."""
    rows, place = part.slot.unique(return_inverse=True)
    return torch.tensor([digest(part.table, int(row)) if row >= 0 else 0 for row in rows])[place]


def digest(table: Stack, row: int) -> int:
    """A number for the contents of a row."""
    state = hashlib.blake2b(digest_size=8)
    for tensor in table.tensors().values():
        state.update(tensor[row].detach().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(state.digest(), "little", signed=True)
