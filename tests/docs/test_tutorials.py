"""The notebooks of the tutorials run from top to bottom, and are small and tidy as they are committed."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.ipynb"))
EVERY = pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def test_there_are_tutorials() -> None:
    assert [path.stem for path in TUTORIALS] == ["from_vit_to_leaf", "your_own_vit"]


@EVERY
def test_a_tutorial_is_valid_small_and_shows_what_it_gives(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert path.stat().st_size < 300_000
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds == {"stream", "display_data"}
    assert not [output for output in outputs(notebook) if output.get("name") == "stderr"]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@EVERY
def test_a_tutorial_runs(path: Path) -> None:
    """An error in a cell is an error here; and it shows as much as it did when it was committed."""
    notebook = nbformat.read(path, as_version=4)
    committed = [output.output_type for output in outputs(notebook)]
    # A slow machine sends what is printed in pieces, some of them a line break only: they are put together.
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, coalesce_streams=True, resources=resources).execute()
    shown = [output for output in outputs(notebook) if output.get("name") != "stderr"]
    assert [output.output_type for output in shown if output.output_type == "display_data"] == [
        kind for kind in committed if kind == "display_data"
    ]
    assert all(output.text.strip() for output in shown if output.output_type == "stream")
