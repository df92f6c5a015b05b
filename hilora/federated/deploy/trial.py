"""What the answer to a download looks like."""

from __future__ import annotations

import torch

from hilora.federated.client import ClientStore
from hilora.federated.data.images import ImageSet
from hilora.federated.data.partitions import Client, Population
from hilora.federated.engine.batched import BatchedEngine
from hilora.federated.engine.trainer import Trainer
from hilora.federated.protocol import Download, Stage, Upload
from hilora.federated.strategies.base import Strategy


class Trial:
    """Answers as a client with one black image would: so the server knows which tensors are to come.

    Args:
        client: a clients' half of the strategy.
        engine: where to compute.
        classes: how many there are.
    """

    def __init__(self, client: Strategy, engine: BatchedEngine, classes: int) -> None:
        self.client, self.engine = client, engine
        size, none = engine.backbone.size, torch.empty(0, dtype=torch.long)
        names = tuple(map(str, range(classes)))
        black = torch.zeros(1, 3, size, size, dtype=torch.uint8)
        self.images = ImageSet(black, torch.zeros(1, dtype=torch.long), names, "black").to(engine.device)
        self.population = Population((Client(torch.tensor([0]), none, none, None, True),), "black", ())
        self.found: dict[Stage, Upload] = {}

    def __call__(self, download: Download) -> Upload:
        """The upload of one client in the stage of a download, for its names, shapes and dtypes."""
        if download.stage not in self.found:
            nobody = torch.tensor([0])
            trainer = Trainer(self.engine, self.images, self.population, nobody, "trial")
            one = download.of(nobody)
            self.found[download.stage] = self.client.local(ClientStore(1).of(nobody), one, trainer)
        return self.found[download.stage]
