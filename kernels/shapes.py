"""Launch sizes in plain Python: Triton's own helpers cost the host 10 us a call."""

from __future__ import annotations

from functools import lru_cache

import torch


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """Least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=8)
def num_programs(device: torch.device) -> int:
    """Programs of a persistent grid: a GPU's multiprocessors."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count
