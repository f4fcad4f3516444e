"""Launch sizes in plain Python: Triton's own helpers cost the host 10 us a call."""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()
