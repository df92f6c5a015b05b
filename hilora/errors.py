"""What goes wrong because of what the library was given: one family of exceptions that name the value and the remedy.

Every class is also the built-in exception that Python programs expect there, so that `except ValueError` works, too. A
bug of the library is none of these, and keeps its traceback.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from hilora.kernels.errors import BackendError, HiLoRAError, InvalidValueError

__all__ = [
    "BackendError",
    "FileError",
    "HiLoRAError",
    "InvalidTypeError",
    "InvalidValueError",
    "MissingFileError",
    "SlotError",
]


OUT_OF_MEMORY = ("OutOfMemoryError", "DefaultCPUAllocator: can't allocate memory", "not enough memory: you tried")
"""Marks of errors that torch raises on a GPU and on a CPU, where there is no class for them."""


class InvalidTypeError(HiLoRAError, TypeError):
    """An object of a kind that cannot be used there."""


class SlotError(HiLoRAError, IndexError):
    """A slot that a table of adapters does not have."""


class MissingFileError(HiLoRAError, FileNotFoundError):
    """A file or folder that is not there."""


class FileError(HiLoRAError, ValueError):
    """A file that is corrupt, foreign, or not of the run or model it is used with."""


class NotAFolderError(HiLoRAError, NotADirectoryError):
    """A path that is there and is no folder."""


class ResourceError(HiLoRAError, RuntimeError):
    """Something from outside of the library that cannot be had: a download, a font."""


@contextmanager
def needed(by: str, extra: str) -> Iterator[None]:
    """Packages that an extra of this library brings are imported inside.

    Raises:
        ResourceError: one is not installed; says how to.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "hilora").split(".")[0] == "hilora":
            raise
        raise ResourceError(f"{by} needs {error.name}: pip install 'hilora[{extra}]'") from error


def told(error: BaseException) -> str | None:
    """What a command says of an error, in one line and without a traceback: where it was given something that it cannot
    use, a file or device that does not work, a package is missing, or memory is full. None where the error is a bug."""
    if isinstance(error, ImportError) and (error.name or "hilora").split(".")[0] != "hilora":
        return f"{error}: install it, as by pip install {(error.name or '').split('.')[0]}"
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(sign in f"{type(error).__name__} {said}" for sign in OUT_OF_MEMORY):
        return f"out of memory: lower clients_at_once, batch_size or the size of the images ({said:.200})"
    return said if isinstance(error, HiLoRAError | OSError) else None
