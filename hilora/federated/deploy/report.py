"""What the server of a deployment leaves in its folder: the summary, and the adapters and heads that are shared."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hilora.adapters.io.files import write_tensors
from hilora.adapters.io.native import save_adapters
from hilora.federated.callbacks.base import Callback
from hilora.reporting.summary import write_summary

if TYPE_CHECKING:
    from hilora.federated.deploy.server import Deployment


class SharedReport(Callback):
    """Writes the results, also of a run that was stopped. What is a client's own is not there."""

    name = "report"

    def end(self, deployment: Deployment) -> None:  # type: ignore[override]
        write_summary(deployment.out / "summary.json", deployment.summary())
        clients = torch.arange(deployment.asked.run.clients)
        shared = deployment.configured(clients)
        whole = {tier: rows.table for tier, rows in shared.tiers.items() if rows.table.A and rows.table.B}
        deployment.engine.keep(whole)
        save_adapters(deployment.engine.model, deployment.out / "adapters.safetensors")
        slots = {tier: shared.tiers[tier].slot.tolist() for tier in whole}
        heads = {} if shared.head is None else shared.head.table.tensors()
        which = None if shared.head is None else shared.head.slot.tolist()
        described = {"classes": deployment.asked.run.class_names, "slots": slots, "head": which}
        write_tensors(deployment.out / "heads.safetensors", heads, described)
