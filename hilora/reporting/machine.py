"""Where and with what something was computed, as results have it beside them."""

from __future__ import annotations

import platform
import subprocess
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from hilora.version import __version__

PACKAGE = Path(__file__).parents[1]


def device_name(device: torch.device) -> str:
    """The GPU, or the CPU and how many of its threads are used."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    cpuinfo = Path("/proc/cpuinfo")
    models = [line for line in cpuinfo.read_text().splitlines() if "model name" in line] if cpuinfo.exists() else []
    name = models[0].split(":", 1)[1].strip() if models else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} thread{'' if torch.get_num_threads() == 1 else 's'}"


def revision(*also: Path) -> str:
    """The version, and the commit where the package is in a repository, with a `+` if its files, or `also` these, have
    changed since."""
    ask = partial(subprocess.check_output, cwd=PACKAGE, text=True, stderr=subprocess.DEVNULL)
    try:
        tracked = ask(["git", "ls-files", "__init__.py"])
        commit = ask(["git", "rev-parse", "--short", "HEAD"]).strip()
        changed = ask(["git", "status", "--porcelain", "--", ".", "../kernels", *map(str, also)])
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__} {commit}{'+' if changed else ''}" if tracked else __version__


def versions(*packages: str) -> dict[str, str]:
    """The installed version of each package; "none" where there is none."""
    return {name: _version(name) for name in packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def today() -> str:
    """The date, UTC, as in 2026-01-31."""
    return f"{datetime.now(UTC):%Y-%m-%d}"
