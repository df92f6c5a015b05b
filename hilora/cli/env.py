"""Say what hilora runs on: versions, devices, the variables that it reads, and who serves a call of each operation."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from hilora.kernels import Tier, explain, gram_penalty, stacked_lora_linear
from hilora.kernels.errors import HiLoRAError
from hilora.reporting.machine import device_name, revision
from hilora.reporting.progress import ending, say

PACKAGES = (
    "triton",
    "timm",
    "transformers",
    "peft",
    "numpy",
    "scipy",
    "scikit-learn",
    "safetensors",
    "pydantic",
)


def parser(prog: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog, description=__doc__)
    found.add_argument("--json", action="store_true", help="as a JSON object")
    return found


def facts() -> dict[str, Any]:
    """What can be told, as JSON has it."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return {
        "hilora": revision(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {"torch": torch.__version__, **{name: _version(name) for name in PACKAGES}},
        "devices": {str(device): _about(device) for device in devices},
        "variables": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(("HILORA_", "TRITON_"))
        },
        "serving": {str(device): [str(one) for one in _serving(device)] for device in devices},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _about(device: torch.device) -> str:
    if device.type == "cpu":
        return device_name(device)
    found = torch.cuda.get_device_properties(device)
    return (
        f"{found.name}, sm_{found.major}{found.minor}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    )


def _serving(device: torch.device) -> list[Any]:
    """Who serves q and v of a ViT-B's fused qkv, three tiers of rank 8 in training, and the penalty between two."""
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    x, weight = torch.zeros(1, 197, 768, device=device, dtype=dtype), torch.zeros(2304, 768, device=device, dtype=dtype)
    A, B = torch.zeros(1, 8, 768, device=device), torch.zeros(1, 768, 8, device=device)
    tiers = [Tier(A.clone().requires_grad_(), B.clone().requires_grad_(), 2.0, columns=(0, 768)) for _ in range(3)]
    penalty = torch.zeros(24, 1, 768, 8, device=device)
    calls = (
        (stacked_lora_linear, (x, weight, None, tiers)),
        (gram_penalty, (penalty.clone().requires_grad_(), [penalty], [0.1])),
    )
    found: list[Any] = []
    for operation, call in calls:
        try:
            found.append(explain(operation, *call))
        except HiLoRAError as error:
            found.append(f"{operation.__name__}: {error}")
    return found


def main(arguments: Sequence[str] | None = None, prog: str = "hilora env") -> int:
    args = parser(prog).parse_args(arguments)

    def work() -> int:
        found = facts()
        say(json.dumps(found) if args.json else _text(found))
        return 0

    return ending(work)


def _text(found: dict[str, Any]) -> str:
    lines = [f"hilora {found['hilora']}, python {found['python']} ({sys.executable}), {found['system']}"]
    lines.append(", ".join(f"{name} {which or 'not installed'}" for name, which in found["packages"].items()))
    for device, words in found["devices"].items():
        lines += ["", f"{device}: {words}", *("\n".join(found["serving"][device]).split("\n"))]
    variables = [f"{name}={value}" for name, value in found["variables"].items()]
    return "\n".join([*lines, "", *(variables or ["no variable HILORA_* or TRITON_* is set"])])
