"""Whether the kernels for Hopper GPUs are to be trusted here: each is tried once a process.

They count on the order in which a thread holds an instruction's results, and the part of Triton
that they are written in is experimental: names and types change in it.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .encode_first_plan import make_first_plan
from .encode_plan import make_plan
from .shapes import num_programs

Part = Literal["filter", "tiles"]

_FOUND: dict[tuple[Part, torch.device, torch.dtype], bool] = {}


def runs(part: Part, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a part runs on a device and gives the plain filter's result. Where a first call is
    captured in a graph, which cannot try it, the answer is no, until it is asked again."""
    key = (part, device, dtype)
    if key not in _FOUND:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        if hopper and torch.cuda.is_current_stream_capturing():
            return False
        _FOUND[key] = hopper and _try(part, device, dtype)
    return _FOUND[key]


def _try(part: Part, device: torch.device, dtype: torch.dtype) -> bool:
    from .encode_topk import fused_topk

    g = torch.Generator(device=device).manual_seed(0)
    # Whole blocks of tokens and a few more, as a block and as a tail of either size.
    N, D, F, k, programs = 300, 328, 8192 + 72, 16, num_programs(device)
    x = torch.randn(N, D, generator=g, device=device).to(dtype)
    W_enc = torch.randn(F, D, generator=g, device=device).to(dtype)
    b_enc = torch.randn(F, generator=g, device=device)

    def plain(rows: int, k: int) -> tuple[Tensor, Tensor]:
        plan = make_plan(N, D, F, k, programs)
        assert plan is not None
        values, indices = fused_topk(x, W_enc, b_enc, k, plan)
        return values[:rows], indices[:rows]

    # What is found, and what the plain filter finds.
    found: list[tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]] = []
    try:
        if part == "filter":
            from . import encode_first

            few, many = (make_first_plan(N, D, F, count, programs) for count in (k, 5 * k))
            assert few is not None
            assert many is not None
            # With programs that do what blocks' own leave. They have room for all that
            # they find: a row that is done anew is summed in another order.
            left = few._replace(others=3, regular=few.parts, capacity=200)
            # More to be sorted, of other samples, in several chunks of rows.
            many = many._replace(block_rows=128, together=True)
            # The last tokens beside whole blocks.
            blocks = make_first_plan(256, D, F, k, programs)
            assert blocks is not None
            tailed = [blocks._replace(tail=tail, held=832) for tail in (16, 32)]
            for rows, count, plan in (
                (N, k, few), (N, k, left), (N, 5 * k, many), (269, k, tailed[0]),
                (288, k, tailed[1]),
            ):  # fmt: skip
                got = encode_first.topk_encode(x[:rows], W_enc, b_enc, count, plan)
                found += [(got, plain(rows, count))]
        else:
            from . import encode_tiles

            # The last of more than one warp selects.
            for rows, tail, count in ((N, 0, k), (269, 16, k), (288, 32, 5 * k)):
                got = encode_tiles.topk_encode(x[:rows], W_enc, b_enc, count, tail)
                found += [(got, plain(rows, count))]
    except torch.OutOfMemoryError:
        raise
    except (
        ImportError, AttributeError, AssertionError, KeyError, TypeError, ValueError, RuntimeError,
        TritonError,
    ) as e:  # fmt: skip
        reason = f"does not compile ({type(e).__name__}: {str(e)[:200]})"
    else:
        if all(torch.equal(got[i], want[i]) for got, want in found for i in (0, 1)):
            return True
        reason = "disagrees with the plain one"
    warnings.warn(
        f"The encoder's {part} for Hopper GPUs {reason} under Triton {triton.__version__}; what "
        "serves every GPU, which is slower, is used.",
        stacklevel=2,
    )
    return False
