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


@lru_cache(maxsize=8)
def num_stages(device: torch.device, stage_bytes: int, most: int = 4) -> int:
    """Stages of a matmul's pipeline that fit a GPU's shared memory, at most `most`: 227 KiB a
    block on Hopper, 163 on A100, 99 on consumer GPUs since Ampere."""
    if device.type != "cuda":
        return 2
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(device.index or 0)
    shared: int = properties["max_shared_mem"]
    # Some is taken by barriers and by sums across warps.
    return min(most, (shared - 2048) // stage_bytes)
