"""Which row of the table serves which GPU."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hilora.kernels import Tier, backends, explain, launch, stacked_lora_linear, use_backend
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


def test_the_row_of_a_gpu_is_found_once_and_by_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def name(index: int) -> str:
        asked.append(index)
        return "NVIDIA Unheard-of"

    monkeypatch.setattr(devices, "architecture", lambda: 90)  # of the current one
    monkeypatch.setattr(torch.cuda, "get_device_name", name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 6)][index])
    devices._of_gpu.cache_clear()
    found = [devices.device(torch.device("cuda", index)).name for index in (0, 1, 0, 1)]
    devices._of_gpu.cache_clear()
    assert found == ["sm_90", "sm_80"] * 2
    assert asked == [0, 1]


def test_tensors_without_memory_have_the_row_of_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on a GPU that has a row of its own."""
    monkeypatch.setattr(devices, "architecture", lambda: 80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: "sm_90")
    assert devices.device(torch.device("meta")).name == "sm_80"


@pytest.mark.skipif(not launch.interpreting(), reason="kernels are compiled here")
def test_no_row_is_named_in_the_interpreter() -> None:
    x, weight = torch.empty(1, 64, 96, dtype=torch.bfloat16), torch.empty(96, 96, dtype=torch.bfloat16)
    tiers = [Tier(torch.empty(1, 8, 96), torch.empty(1, 96, 8), 1.0)]
    with use_backend("fused"):
        said = str(explain(stacked_lora_linear, x, weight, None, tiers))
    assert "fused serves, in the interpreter\n" in said


@pytest.mark.parametrize("grouped", [False, True])
def test_a_compiled_call_chooses_as_a_plain_one_does(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break: the operator is in the only graph."""
    monkeypatch.setattr(backends, "_kernels_cannot", lambda *call: "")
    monkeypatch.setattr(backends, "_WITHOUT_A_GPU", backends.BACKENDS)
    monkeypatch.setattr(devices, "architecture", lambda: 90)
    graphs: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, _: Sequence[Any]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return lambda *given: (torch.zeros(2, 64, 192),)

    weight = torch.randn(192, 64, dtype=torch.bfloat16)
    slot = torch.tensor([1, 0], dtype=torch.int32) if grouped else None

    def call(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return stacked_lora_linear(x, weight, None, [Tier(A, B, 2.0, slot, (0, 64))])

    torch._dynamo.reset()
    slots = 2 if grouped else 1
    given = torch.randn(2, 64, 64).bfloat16(), torch.randn(slots, 8, 64), torch.randn(slots, 64, 8)
    torch.compile(call, fullgraph=True, backend=backend)(*given)
    (targets,) = graphs
    assert "hilora.stacked_lora_linear.default" in targets


def test_constants_are_found_again_by_what_they_are() -> None:
    tile = launch.Tile(1, 2, 3, 4, 5)
    one, other = launch.Constants(tile, R=8), launch.Constants(tile, R=8)
    assert hash(one) == hash(other)
    assert one == other != launch.Constants(tile, R=16)
    assert (one["BM"], one["num_stages"], one["R"]) == (1, 5, 8)
