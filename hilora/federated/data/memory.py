"""How much memory there is for images, whatever limits it: the machine, a container, or the shell's `ulimit`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 4 * 10**9
"""What is taken for granted where no system says what is free."""
# Of a control group: its limit, what it uses, and the name in memory.stat of what of that could be freed.
_GROUPS = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take: what Linux could free, or what a limit leaves of it.

    Limits are those of its control groups (containers, batch systems), of its address space and of its data. `root` is
    where the system's files are.
    """
    return max(0, min([*_free(root), *_left_in_groups(root), *_left_in_limits(root)], default=UNKNOWN))


def fits(size: int) -> bool:
    """Whether so many bytes of images shall be in memory: where they take at most half of what is available."""
    return 2 * size <= available_memory()


def _free(root: Path) -> Iterator[int]:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _left_in_groups(root: Path) -> Iterator[int]:
    """What the control groups of the process leave, from its own up to the one at the top."""
    names = [line.split(":", 2)[2].strip("/") for line in _read(root / "proc/self/cgroup").splitlines()]
    for place, limit, usage, freeable in _GROUPS:
        top = root / place.relative_to("/")
        for group in {top / above for name in names for above in (Path(name), *Path(name).parents)} | {top}:
            most, used = _read(group / limit).strip(), _read(group / usage).strip()
            if most.isdigit() and used.isdigit():  # no limit is "max", or a number beyond all memory
                stat = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                yield int(most) - int(used) + int(stat.get(freeable, 0))


def _left_in_limits(root: Path) -> Iterator[int]:
    pages = _read(root / "proc/self/statm").split()
    if pages:  # on Linux
        import resource

        for kind, used in ((resource.RLIMIT_AS, pages[0]), (resource.RLIMIT_DATA, pages[5])):
            limit = resource.getrlimit(kind)[0]
            if limit != resource.RLIM_INFINITY:
                yield limit - int(used) * resource.getpagesize()


def _read(path: Path) -> str:
    """The text of a file of the system; none where it is not there, or not for us."""
    try:
        return path.read_text()
    except OSError:
        return ""
