"""What each instruction does, a file a group."""

from . import arithmetic, asynchronous, control, conversions, matrices, mbarriers, memory, tma, wgmma  # noqa: F401
