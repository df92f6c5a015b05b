"""What a run leaves in its folder: its summary, the adapters and heads of all clients, pictures, a page to look at."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hilora.adapters.io.files import write_tensors
from hilora.adapters.io.native import save_adapters
from hilora.federated.callbacks.base import Callback
from hilora.federated.callbacks.checkpoint import CHECKPOINT, PREVIOUS
from hilora.federated.callbacks.metrics import Metrics
from hilora.federated.client import Models
from hilora.files import write_text
from hilora.reporting.run_page.page import run_page
from hilora.reporting.summary import write_summary

if TYPE_CHECKING:
    from hilora.federated.simulation import Simulation

log = logging.getLogger(__name__)
PICTURES = ("accuracy.png", "clusters.png", "classes.png")
RESULTS = (
    "summary.json",
    "metrics.jsonl",
    CHECKPOINT,
    PREVIOUS,
    "adapters.safetensors",
    "heads.safetensors",
    *PICTURES,
    "report.html",
    "events.out.tfevents.*",
)
"""The files of a run, as patterns."""


class Report(Callback):
    """Writes the results, also of a run that was stopped: what was trained first, and then what shows it."""

    name = "report"

    def end(self, simulation: Simulation) -> None:
        summary, images, population = simulation.summary(), simulation.train_images, simulation.population
        out = simulation.out
        write_summary(out / "summary.json", summary)
        everyone = torch.arange(len(population.clients))
        models = simulation.models(everyone)
        adapters, heads = simulation.server.tables(models)
        simulation.engine.keep(adapters)
        save_adapters(simulation.engine.model, out / "adapters.safetensors")
        named = {f"{tier}.{name}": value for tier, head in heads.items() for name, value in head.items()}
        write_tensors(out / "heads.safetensors", named, {"classes": images.classes, "models": described(models)})
        counts = population.class_counts(images.labels, len(images.classes))
        try:
            _show(simulation, summary, counts)
        except OSError:
            raise
        except Exception:  # what was trained is there, and other runs may follow
            log.exception("%s: its pictures or its report could not be made", out)


def _show(simulation: Simulation, summary: dict[str, Any], counts: Tensor) -> None:
    """The page and the pictures of a run; `counts` are its clients' training images by class."""
    from hilora.reporting.plots import draw_run  # loads matplotlib

    population = simulation.population
    seen = torch.tensor([client.seen for client in population.clients])
    records = next((one.log.records for one in simulation.callbacks if isinstance(one, Metrics)), [])
    settings = {**simulation.settings.unusual(), **simulation.server.settings.unusual()}
    truth, names = population.true_groups, population.groups
    write_text(simulation.out / "report.html", run_page(summary, records, settings, truth, names))
    draw_run(simulation.out, summary, records, counts, seen, truth, names, simulation.server.clustering())


def described(models: Models) -> dict[str, Any]:
    """Which of the saved adapters and heads each client has, by its id; and what else its predictions need, if it is
    more than these: the name of a composition."""
    return {
        "slots": {tier: rows.slot.tolist() for tier, rows in models.tiers.items()},
        "head": models.head.slot.tolist(),
        "composition": None if models.composition is None else type(models.composition).__name__,
    }
