"""The order of tiles."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def tile_at(index, tiles, TALL: gl.constexpr):
    """Group, block of rows and block of columns of a tile. Tiles near to each other run at the same time.

    Args:
        tiles: how many there are, in all, along the rows, and along the rows of a group.
    """
    total, tiles_m, blocks = tiles
    tiles_n = total // tiles_m
    band = index // (TALL * tiles_n)
    height = gl.minimum(tiles_m - band * TALL, TALL)
    tile_m = band * TALL + (index % (TALL * tiles_n)) % height
    return tile_m // blocks, tile_m % blocks, (index % (TALL * tiles_n)) // height
