"""What a reader of images is: it knows its kind of data when it sees it, and reads it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from hilora.federated.data.images import ImageSet


class Reader(ABC):
    """Reads one kind of data on disk, from a path alone.

    A class in a file of this folder is found there; one that lives elsewhere is made known by `register`.

    Attributes:
        name: what the kind is called.
        fallback: whether it is asked only where no other reader knows the data.
    """

    name: ClassVar[str]
    fallback: ClassVar[bool] = False

    @abstractmethod
    def recognises(self, path: Path) -> bool:
        """Whether this is data of its kind, at a glance; `path` need not exist."""

    @abstractmethod
    def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
        """Reads the training and the test images.

        Args:
            path: of the data.
            size: height and width of the images, where the data do not have a size of their own.
            seed: of the split, where the data do not have one of their own.

        Raises:
            MissingFileError, NotAFolderError, FileError: the data are not there, or not as they should be.
        """
