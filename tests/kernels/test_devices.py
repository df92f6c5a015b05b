"""Which row of the table serves which GPU."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from hilora.kernels import Tier, backends, explain, launch, stacked_lora_linear
from hilora.kernels.stacked_linear import devices


@pytest.mark.parametrize(
    ("arch", "row"), [(80, "sm_80"), (86, "sm_80"), (89, "sm_80"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120")]
)
def test_a_device_without_a_row_has_that_of_its_architecture(arch: int, row: str) -> None:
    assert devices._row("NVIDIA Unheard-of", arch).name == row


def test_a_measured_device_has_its_own(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = json.loads(devices.PATH.read_text())
    rows["NVIDIA H200"] = rows["sm_90"] | {"source": "measured", "one_kernel_from": 512}
    table = tmp_path / "devices.json"
    table.write_text(json.dumps(rows))
    monkeypatch.setattr(devices, "PATH", table)
    devices._row.cache_clear()
    found, other = devices._row("NVIDIA H200", 90), devices._row("NVIDIA H100 PCIe", 90)
    devices._row.cache_clear()
    assert (found.name, found.one_kernel_from) == ("NVIDIA H200", 512)
    assert (other.name, other.one_kernel_from) == ("sm_90", 64)


@pytest.mark.parametrize(
    ("arch", "rows", "width", "dtype", "rank", "serves"),
    [
        (90, 64, 768, torch.bfloat16, 8, "fused"),
        (90, 63, 768, torch.bfloat16, 8, "split"),
        (90, 64, 768, torch.bfloat16, 70, "split"),  # ranks that one kernel does not take
        (90, 64, 768, torch.float32, 8, "split"),
        (80, 64, 768, torch.bfloat16, 8, "split"),
        (80, 64, 192, torch.bfloat16, 8, "fused"),
    ],
)
def test_who_serves_on_a_gpu(
    arch: int, rows: int, width: int, dtype: torch.dtype, rank: int, serves: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_kernels_cannot", lambda *call: "")
    monkeypatch.setattr(devices, "architecture", lambda: arch)
    with torch.device("meta"):
        x, weight = torch.empty(1, rows, width, dtype=dtype), torch.empty(3 * width, width, dtype=dtype)
        tiers = [Tier(torch.empty(1, rank, width), torch.empty(1, width, rank), 1.0, None, (0, width))]
    found = explain(stacked_lora_linear, x, weight, None, tiers)
    assert found.backend == serves
    assert f"by the row sm_{arch} of devices.json" in str(found)


def test_constants_are_found_again_by_what_they_are() -> None:
    tile = launch.Tile(1, 2, 3, 4, 5)
    one, other = launch.Constants(tile, R=8), launch.Constants(tile, R=8)
    assert hash(one) == hash(other)
    assert one == other != launch.Constants(tile, R=16)
    assert (one["BM"], one["num_stages"], one["R"]) == (1, 5, 8)
