"""Glyphs, which are drawn and not read: their path is their name."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from hilora.federated.data.images import ImageSet
from hilora.federated.data.readers.base import Reader


class Glyphs(Reader):
    """The images of `load_glyphs`, where the path is `glyphs` and nothing is there; they keep their 32 pixels."""

    name: ClassVar[str] = "glyphs"

    def recognises(self, path: Path) -> bool:
        return str(path) == self.name and not path.exists()

    def read(self, path: Path, size: int, seed: int) -> tuple[ImageSet, ImageSet]:
        from hilora.federated.data.glyphs import load_glyphs

        return load_glyphs(seed)
