"""What goes wrong because of what the kernels were given. `hilora.errors` has the rest of the family."""


class HiLoRAError(Exception):
    """The library was given something that it cannot use."""


class InvalidValueError(HiLoRAError, ValueError):
    """A value, shape, rank or dtype that does not fit."""


class BackendError(HiLoRAError, RuntimeError):
    """The implementation that was asked for cannot run here."""
