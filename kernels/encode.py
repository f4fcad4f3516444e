"""Encoder matmul with an exact top-k in its epilogue: no [N, F] tensor exists.

Legend: N tokens, D d_in, F d_sae (of this shard), K k.

Which design a call takes is a function of the GPU and the shape alone: `hopper`, the filter for
compute capability 9.0; `plain`, the portable one; `rows`, a library matmul in blocks of rows, for
few tokens and for what the others do not take. encode_plan.py has a picture of how they work.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import encode_rows
from .encode_filter import PlainFilter
from .encode_plan import BLOCK_M, CELL, Plan, make_plan, sort_size, spread
from .encode_select import limit_kernel, mend_kernel, select_kernel
from .shapes import cdiv, next_power_of_2, num_programs

Design = Literal["hopper", "plain", "rows"]


class Matmul(Protocol):
    """`encode_filter.PlainFilter`, or one like it."""

    def write(self, x: Tensor, scratch: Tensor) -> None:
        """The sample's pre-activations."""

    def filter(self, x: Tensor, limit: Tensor, scratch: Tensor, count: Tensor) -> None:
        """Lists of what passes of the other tiles."""


# Two blocks of tokens would give the filter no more than 64 programs.
_FEW_TOKENS = 256


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    """ROCm, too, has a capability of (9, 0)."""
    return torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)


def kind_of(x: Tensor, *, fp8: bool = False) -> Design:
    """The design that tokens take, or a search by e4m3 products, where there is a plan."""
    if (x.shape[1] % 16 if fp8 else x.dtype == torch.float32) or len(x) <= _FEW_TOKENS:
        return "rows"
    return "hopper" if _is_hopper(x.device) else "plain"


def choose(x: Tensor, W_enc: Tensor, k: int, *, fp8: bool = False) -> tuple[Design, Plan | None]:
    """The design of a call, and its plan where it has one."""
    design, plan = kind_of(x, fp8=fp8), None
    if design != "rows":
        plan = make_plan(*x.shape, W_enc.shape[0], k, num_programs(x.device))
    return ("rows" if plan is None else design), plan


def matmul_of(design: Design, W_enc: Tensor, b_enc: Tensor, plan: Plan) -> Matmul:
    """The filter of a design that has a plan."""
    if design == "plain":
        return PlainFilter(W_enc, b_enc, plan)
    # Imported here: Gluon's Hopper part is not in every Triton.
    from .encode_hopper import HopperFilter

    return HopperFilter(W_enc, b_enc, plan)


def filtered_topk(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    plan: Plan,
    matmul: Matmul,
    scale: Tensor | None = None,  # [F] float32 of e4m3 rows
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The k largest by a filter, with the sizes of a plan."""
    (N, D), F, device = x.shape, W_enc.shape[0], x.device
    values = torch.empty(N, k, dtype=torch.float32, device=device)
    indices = torch.empty(N, k, dtype=torch.int32, device=device)
    rows = min(cdiv(N, BLOCK_M) * BLOCK_M, plan.block_rows)
    scratch = torch.empty(rows, plan.pitch, dtype=torch.int32, device=device)
    kept = torch.empty(rows, plan.sample_keys, dtype=torch.int64, device=device)
    count = torch.empty(rows, plan.lists, dtype=torch.int32, device=device)
    limit, num_kept, short = torch.empty(3, rows, dtype=torch.int32, device=device).unbind()
    sizes = select_sizes(plan, k)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        matmul.write(part, scratch)
        limit_kernel[(part.shape[0],)](
            scratch, limit, kept, num_kept, plan.pitch, plan.whole, spread(plan.whole),
            plan.rank, plan.slack, plan.sample_keys, plan.sample, next_power_of_2(plan.sample),
            next_power_of_2(plan.rank + plan.slack), plan.block_n, CELL,
            num_warps=limit_warps(plan),
        )  # fmt: skip
        matmul.filter(part, limit, scratch, count)
        size, out = part.shape[0], (values[start:], indices[start:])
        select_kernel[(size,)](
            limit, kept, num_kept, count, scratch, short, *out, plan.pitch, plan.sample_keys,
            plan.capacity, F, k, **sizes,
            num_warps=select_warps(plan),
        )  # fmt: skip
        each = next_power_of_2(cdiv(size, num_programs(device)))
        mend_kernel[(cdiv(size, each),)](
            part, W_enc, b_enc, scale, short, scratch, *out, plan.pitch, size, F, D, k, each,
            sizes["SORT"], 32, 64, num_warps=8,
        )  # fmt: skip
    return values, indices


def limit_warps(plan: Plan) -> int:
    """That look through a row's sample."""
    return 1 if plan.sample <= 16 else 4


def select_warps(plan: Plan) -> int:
    """That select a row's k largest: few, so that many rows are at work."""
    return max(1, min(8, plan.keys // 512))


def select_sizes(plan: Plan, k: int) -> dict[str, int]:
    """What a row's selection holds."""
    return {
        "LISTS": plan.lists,
        "LISTS_POW2": next_power_of_2(plan.lists),
        "SLOTS": plan.slots,
        "SAMPLE_POW2": next_power_of_2(plan.sample_keys),
        "SORT": sort_size(k),
        "KEYS": plan.keys,
    }


def aligned(t: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on, which the copy engine asks for."""
    t = t.contiguous()
    if t.ndim == 2:
        # A single row is contiguous whatever its stride says, which the copy engine reads.
        t = t.as_strided(t.shape, (t.shape[1], 1))
    return t if t.data_ptr() % 16 == 0 else t.clone()


def topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` on a GPU."""
    x, W_enc, b_enc = aligned(x), aligned(W_enc), aligned(b_enc.float())
    design, plan = choose(x, W_enc, k)
    return run(design, plan, x, W_enc, b_enc, k)


def run(
    design: Design, plan: Plan | None, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """`topk_encode` by a design, of inputs from 16-byte boundaries on."""
    if plan is None:
        return encode_rows.topk_encode(x, W_enc, b_enc, k)
    return filtered_topk(x, W_enc, b_enc, k, plan, matmul_of(design, W_enc, b_enc, plan))
