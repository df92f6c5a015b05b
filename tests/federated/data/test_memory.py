from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hilora.federated.data.memory import UNKNOWN, available_memory, fits

GB = 2**30


def system(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MACHINE = {
    "proc/meminfo": f"MemTotal: {20 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n",
    "proc/self/cgroup": "0::/a/b\n",
}
NEW, OLD = "sys/fs/cgroup/", "sys/fs/cgroup/memory/"


def group(place: str, limit: str, used: int, cached: int = 0) -> dict[str, str]:
    old = place.startswith(OLD)
    limit_file, used_file = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if old else ("memory.max", "memory.current")
    )
    stat = f"anon 5\n{'total_' * old}inactive_file {cached}\n"
    return {place + limit_file: limit + "\n", place + used_file: f"{used}\n", place + "memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, UNKNOWN),
        (MACHINE, 8 * GB),
        (MACHINE | group(NEW + "a/b/", "max", GB), 8 * GB),
        (MACHINE | group(NEW + "a/b/", str(5 * GB), 3 * GB, GB), 3 * GB),
        (MACHINE | group(NEW + "a/", str(4 * GB), 3 * GB) | group(NEW + "a/b/", str(5 * GB), GB), GB),
        (MACHINE | group(NEW, str(2 * GB), 2 * GB + 1), 0),
        (MACHINE | {"proc/self/cgroup": "4:memory:/x\n"} | group(OLD + "x/", str(6 * GB), 4 * GB, GB), 3 * GB),
        (MACHINE | group(OLD, "9223372036854771712", GB), 8 * GB),
    ],
)
def test_the_tightest_limit_counts(tmp_path, files, expected) -> None:
    assert available_memory(system(tmp_path, files)) == expected


def test_a_limit_of_the_address_space_counts() -> None:
    code = """
import resource
from pathlib import Path
from hilora.federated.data.memory import available_memory, fits
before = available_memory()
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**27, resource.RLIM_INFINITY))
print(before > 2**27 >= available_memory() > 2**26, fits(2**25), fits(2**27))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True True False\n", done.stderr


def test_what_takes_more_than_half_does_not_fit() -> None:
    assert fits(0)
    assert not fits(available_memory())
