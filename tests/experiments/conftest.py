"""A small experiment as text, and lines of a ledger written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hilora.experiments.experiment import Experiment
from hilora.experiments.plan import Job
from hilora.experiments.records import Line
from hilora.experiments.spec import read_experiment

SMALL = """
title = "Small"
seeds = [0, 1]

[model]
backbone = "glyph_vit"
dtype = "float32"

[run]
rounds = [1, 1, 0]
rank = 2
batch_size = 4
unseen_epochs = 1

[settings.groups]
data = "glyphs"
partition = "sc-dir"
clients = 5
images_per_client = 8

[settings.mixed]
data = "glyphs"
partition = "gl-dir"
clients = 4
images_per_client = 8
seeds = [0]

[methods.hilora]
label = "HiLoRA"

[methods.fedit]
"""
GRIDS = """
[tuning]
seed = 100
clients = 3
"""
GRID = "grid = [{}, { lr = 1e-3 }]"

Write = Callable[..., Experiment]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes the small experiment with (old, new) exchanged in its text, or more behind it, and reads it."""

    def build(*changes: tuple[str, str], more: str = "", text: str = SMALL) -> Experiment:
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "small.toml"
        path.write_text(text + more)
        return read_experiment(path)

    return build


@pytest.fixture
def tuned(write: Write) -> Experiment:
    """The small experiment with a grid of two points for each method."""
    return write(
        ('label = "HiLoRA"', f'label = "HiLoRA"\n{GRID}'), ("[methods.fedit]", f"[methods.fedit]\n{GRID}"), more=GRIDS
    )


def line(job: Job, test: float | None = 0.5, val: float | None = 0.5, **figures: Any) -> Line:
    """A finished run as the ledger has it."""
    return {
        "key": job.key,
        "decides": job.decides,
        "results": {
            "final": {"mean": test, "tail": None, "std": None},
            "val": {"mean": val, "tail": None, "std": None},
            **figures,
        },
        "date": "2026-01-02",
        "revision": "0.1.0 abc",
        "torch": "2.11",
        "device": "a device",
        "dtype": "float32",
    }
