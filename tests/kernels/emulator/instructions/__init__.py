"""What each instruction does, a file a group."""

from . import arithmetic, asynchronous, control, conversions, matrices, memory, wgmma  # noqa: F401
