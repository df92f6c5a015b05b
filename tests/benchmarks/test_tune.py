"""What tuning writes into the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from hilora.kernels.launch import Tile
from hilora.kernels.stacked_linear import devices

BEST = Tile(128, 64, 64, 4, 4)


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> devices.Device:
    """Of a GPU on which the fused plan and one kernel are always ahead, and nothing is timed."""
    found = devices._row("", 90)
    monkeypatch.setattr(devices, "device", lambda *of: found)
    monkeypatch.setattr(tune, "device_name", lambda *of: "NVIDIA Unheard-of")
    monkeypatch.setattr(tune, "_best_tile", lambda *call: BEST)
    monkeypatch.setattr(tune, "compile_ahead", lambda *call: None)
    for name in ("_one_kernel_is_ahead", "_fused_is_ahead"):
        monkeypatch.setattr(tune, name, lambda *call: True)
    return found


def tuned(table: Path) -> dict[str, Any]:
    tune.main(["--scale", "cuda", "--table", str(table)])
    found: dict[str, Any] = json.loads(table.read_text())["NVIDIA Unheard-of"]
    return found


def test_a_table_that_is_not_there_yet(row: devices.Device, tmp_path: Path) -> None:
    found = tuned(tmp_path / "new" / "table.json")
    assert found["tiles"] == {name: list(BEST if name in tune.CANDIDATES else tile) for name, tile in row.tiles.items()}
    assert found["one_kernel_from"] == min(tune.ROWS)


def test_a_plan_that_is_always_ahead_serves_all_widths_that_were_tried(row: devices.Device, tmp_path: Path) -> None:
    below = tuned(tmp_path / "table.json")["fused_below"]
    assert all(2 * 3 * width * width < below * 4 * width for width in tune.WIDTHS)


def test_a_plan_that_loses_from_a_width_on(
    row: devices.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "_fused_is_ahead", lambda row, rows, width, scale: width < 768)
    below = tuned(tmp_path / "table.json")["fused_below"]
    assert [2 * 3 * w * w < below * 4 * w for w in tune.WIDTHS] == [w < 768 for w in tune.WIDTHS]


def test_what_was_found_before_it_was_stopped_stands_there(
    row: devices.Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*call: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "_one_kernel_is_ahead", stopped)
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"sm_90": {}}))
    with pytest.raises(KeyboardInterrupt):
        tuned(table)
    found = json.loads(table.read_text())
    assert found["sm_90"] == {}
    assert found["NVIDIA Unheard-of"]["tiles"]["rows"] == list(BEST)
    assert found["NVIDIA Unheard-of"]["source"].endswith(": tiles of rows, tiles of gemm of wide tiles, tiles of gemm")


@pytest.mark.parametrize("case", ["gemm", "gemm of wide tiles"])
def test_each_tile_of_a_product_is_the_one_that_is_timed(case: str, row: devices.Device) -> None:
    for tile in tune.CANDIDATES[case]:
        tried = tune.with_tile(row, case, tile)
        assert [tried.gemm_tile(torch.bfloat16, 12_608, columns) for columns in (2304, 768)] == [tile, tile]


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_is_launched(tmp_path: Path) -> None:
    (tmp_path / "tuning.py").write_text(AHEAD)
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_INTERPRET": "0"}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(tmp_path / "tuning.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ahead, then = map(int, done.stdout.split())
    assert ahead == then > 5


ROOT = Path(__file__).parents[2]
AHEAD = """
import os
from pathlib import Path

from benchmarks import tune
from hilora.kernels.launch import Tile
from hilora.kernels.stacked_linear import devices

def kernels():
    return len(list(Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")))

if __name__ == "__main__":
    row, tile = devices._row("", 90), Tile(64, 64, 64, 4, 2)
    calls = [(tune.with_tile(row, case, tile), tune.PLANS[case], 64, 64) for case in ("rows", "gemm")]
    calls.append((row, "fused", 64, 64))
    tune.compile_ahead(calls, 90)
    ahead = kernels()
    tune.passes = lambda *call, device, passes=tune.passes: passes(*call)  # on tensors that have memory
    for call in calls:
        tune._compile(*call, 90)
    print(ahead, kernels())
"""
