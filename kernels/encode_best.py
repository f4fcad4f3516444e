"""The second list's best entries of a row for Hopper: encode_aux.py's merge of a first chunk by
warps that hold all of it (encode_best_ptx.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_best_ptx import best_ptx
from .encode_pick import address_of
from .shapes import cdiv, next_power_of_2

# Shared memory holds so many of a row's best.
_MOST = 2048
# Keys of a row that a thread holds.
_HELD = 64


@triton.jit
def best_kernel(
    keys_ptr,  # [N, CHUNK] int32, ordered as the values; the least int32 is none
    list_ptr,  # [CHUNK] int32: latents
    count_ptr,  # how many there are, of which a chunk is looked at
    values_ptr,
    indices_ptr,
    CHUNK,
    k,
    EACH: tl.constexpr,
    MOST: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A row's list of the first chunk."""
    tl.extra.cuda.gdc_wait()
    threads = tl.zeros((32 * WARPS,), tl.int32)
    tl.inline_asm_elementwise(
        best_ptx(EACH, MOST, WARPS), "=&r,r,r,r,r,l,l,l,l",
        [
            threads + tl.program_id(0), threads + tl.minimum(tl.load(count_ptr), CHUNK),
            threads + k, threads + CHUNK * 4, address_of(keys_ptr, threads),
            address_of(list_ptr, threads), address_of(values_ptr, threads),
            address_of(indices_ptr, threads),
        ],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def best_sizes(chunk: int, k: int) -> dict[str, int] | None:
    """What `best_kernel` is to be compiled for; None where there is no room."""
    warps = max(2, next_power_of_2(cdiv(chunk, 32 * _HELD)))
    if k > _MOST or warps > 8:
        return None
    each, most = cdiv(chunk, 128 * warps) * 4, cdiv(k, 64) * 64
    return {"EACH": each, "MOST": most, "WARPS": warps, "num_warps": warps, "maxnreg": 80}
