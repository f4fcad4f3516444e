"""crc32c of bytes that pass, and of parts put together."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

# Reversed, as crc32c has it.
_POLYNOMIAL = 0x82F63B78


class Part(NamedTuple):
    """A run of a file's bytes."""

    start: int
    size: int
    crc: int


def _times(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), reversed, modulo crc32c's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(64)
def _behind(size: int) -> int:
    """x ** (8 * size): what a sum is multiplied by where size bytes follow."""
    power, square, left = 1 << 31, 1 << 30, 8 * size
    while left:
        if left & 1:
            power = _times(power, square)
        square, left = _times(square, square), left >> 1
    return power


def combine(parts: Sequence[Part]) -> str:
    """crc32c, in hex, of bytes whose parts, in any order, leave none out: sums are linear, so that
    of A then B is that of A times x ** bits(B), plus that of B.
    """
    crc, end = 0, 0
    for part in sorted(parts):
        assert part.start == end, "parts lie side by side"
        crc, end = _times(_behind(part.size), crc) ^ part.crc, end + part.size
    return f"{crc:08x}"
