"""What is done with clients' messages before the strategy sees them, in a simulation and in a deployment alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hilora.errors import InvalidValueError
from hilora.federated.privacy import Privacy
from hilora.federated.protocol import Download, Upload
from hilora.federated.strategies.base import Strategy
from hilora.federated.vetting import layout, vet


class Reception:
    """Vets messages, leaves out what cannot be used, and with `dp_clip` lets the strategy have the noised mean alone.

    Args:
        server: the server's half of the strategy.
        noise_seed: of the noise of differential privacy; by default the training's seed. Where privacy counts it has
            to be a secret.

    Attributes:
        left_out: of the last messages, why each client's was left out, by its id.

    Raises:
        InvalidValueError: for settings that cannot go together.
    """

    def __init__(self, server: Strategy, noise_seed: int | None = None) -> None:
        self.server, settings = server, server.training
        self.left_out: dict[int, str] = {}
        self.privacy: Privacy | None = None
        if settings.dp_clip is not None:
            if not server.sums:
                raise InvalidValueError(
                    f"dp_clip={settings.dp_clip}: {server.name or type(server).__name__} needs more of what clients "
                    "send than a mean, so that it would have no use of a noised one"
                )
            if settings.robust != "none":
                raise InvalidValueError(
                    f"robust={settings.robust!r} with dp_clip: the server has the noised mean alone, which was clipped"
                )
            self.privacy = Privacy(settings, noise_seed)

    def __call__(self, download: Download, upload: Upload, purpose: str, round: int, clients: int) -> Upload:
        """What the strategy gets of messages of n clients.

        Args:
            download: what they were sent, in the order of `upload`.
            upload: what they sent.
            purpose: "training" in a round. Under differential privacy nobody answers outside of rounds.
            round: its number in the run, from 1.
            clients: how many the n were drawn from.

        Raises:
            InvalidValueError: the messages are not those that `Strategy.sends` says.
        """
        self.left_out = {}
        if not self.server.travels:
            return upload
        expected = self.server.expected(download.stage)
        misfit = layout(upload, expected)
        if misfit is not None:
            name = self.server.name or type(self.server).__name__
            raise InvalidValueError(f"a message of {name}'s clients: {misfit}; its `sends` says what they send")
        reasons = vet(upload, expected, download, self.server.training.update_bound)
        usable = torch.tensor([reason is None for reason in reasons], dtype=torch.bool)
        self.left_out = {int(client): said for client, said in zip(upload.clients, reasons, strict=True) if said}
        if self.privacy is None:
            return upload if usable.all() else upload.rows(usable)
        if purpose != "training":
            return upload.rows(torch.empty(0, dtype=torch.long))
        return self.privacy.release(upload, download, usable, round, clients)

    def note(self) -> dict[str, Any]:
        """What is worth a note in the metrics of a round."""
        left_out = {str(client): reason for client, reason in self.left_out.items()}
        epsilon = {} if self.privacy is None else {"epsilon": self.privacy.epsilon()}
        return {**({"left_out": left_out} if left_out else {}), **epsilon}

    def summary(self) -> dict[str, Any]:
        """What the summary of the run says."""
        return {} if self.privacy is None else {"privacy": self.privacy.summary()}

    def state_dict(self) -> dict[str, Any]:
        return {} if self.privacy is None else self.privacy.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.privacy is not None:
            self.privacy.load_state_dict(state)
