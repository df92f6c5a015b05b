"""Damaged copies of files: bytes flipped, cut, repeated, exchanged, numbers grown, words swapped."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

NUMBER = re.compile(rb"-?\d+(\.\d+)?")
WORDS = (b"null", b"-1", b"1e999", b"NaN", b"99999999999999999999", b'"\\ud800"', b"[]", b"{}", b"true", b"0")
BYTES = (b"\0", b"\xff", b"\xff\xff\xff\xff\xff\xff\xff\x7f", b"\0\0\0\0", b"\n", b"%!PS", b"[" * 3000, b"../" * 20)


def flipped(data: bytearray, draws: random.Random) -> None:
    """One bit, or several."""
    for _ in range(draws.choice((1, 1, 2, 8))):
        data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)


def cut(data: bytearray, draws: random.Random) -> None:
    """The end is missing, or a piece."""
    start = draws.randrange(len(data))
    del data[start : draws.choice((len(data), start + draws.randint(1, 64)))]


def repeated(data: bytearray, draws: random.Random) -> None:
    """A piece stands twice."""
    start = draws.randrange(len(data))
    piece = data[start : start + draws.randint(1, 256)]
    data[start:start] = piece * draws.choice((1, 1, 20))


def overwritten(data: bytearray, draws: random.Random) -> None:
    """Bytes that readers take for sizes, ends or something else stand in a place, near the start more often."""
    start = draws.randrange(draws.choice((min(16, len(data)), len(data))))
    piece = draws.choice(BYTES)
    data[start : start + draws.choice((0, len(piece)))] = piece


def renumbered(data: bytearray, draws: random.Random) -> None:
    """A number that is written out is another one, or something else."""
    found = list(NUMBER.finditer(bytes(data[:20_000])))
    if found:
        match = draws.choice(found)
        data[match.start() : match.end()] = draws.choice((*WORDS, match[0] + b"000", b"-" + match[0]))


def swapped(data: bytearray, draws: random.Random) -> None:
    """Two lines have changed places, or one is gone."""
    lines = bytes(data).splitlines(keepends=True)
    first, second = (draws.randrange(len(lines)) for _ in range(2))
    lines[first], lines[second] = lines[second], draws.choice((lines[first], b""))
    data[:] = b"".join(lines)


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    flipped,
    cut,
    repeated,
    overwritten,
    renumbered,
    swapped,
)


def mutated(content: bytes, draws: random.Random) -> bytes:
    """A damaged copy; the same random state gives the same one."""
    data = bytearray(content)
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        if data:
            draws.choice(MUTATIONS)(data, draws)
    return bytes(data)
