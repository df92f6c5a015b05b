"""What the emulator says where it stops."""

from __future__ import annotations


class Fault(Exception):
    """The kernel does what would fail, or be undefined, on a GPU."""


class Unsupported(Exception):
    """The kernel does what the emulator does not know."""
