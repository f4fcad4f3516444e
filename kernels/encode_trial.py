"""Whether the kernels for Hopper GPUs are to be trusted here: each is tried once a process.

They count on the order in which a thread holds an instruction's results, and the part of Triton
that they are written in is experimental: names and types change in it.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch
import triton
from triton.errors import TritonError

from . import encode_plan
from .encode_plan import make_first_plan, make_plan
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
    N, D, F, k = 300, 328, 8192 + 72, 16
    x = torch.randn(N, D, generator=g, device=device).to(dtype)
    W_enc = torch.randn(F, D, generator=g, device=device).to(dtype)
    b_enc = torch.randn(F, generator=g, device=device)
    plan = make_plan(N, D, F, k, num_programs(device))
    assert plan is not None
    want = fused_topk(x, W_enc, b_enc, k, plan)
    try:
        if part == "filter":
            from . import encode_first

            first = make_first_plan(N, D, F, k, num_programs(device))
            assert first is not None
            # A larger sample, too, in several chunks of rows, and more to be sorted.
            parts = first.parts // 2
            cells = encode_plan.QUADS * 2 * parts * 2
            order = encode_plan._order(k, encode_plan.QUADS * 2 * ((F - 1) // 256), cells)
            assert order is not None
            larger = first._replace(
                first=2, cells=2, parts=parts, order=order, capacity=2 * first.capacity, size=128,
                block_rows=128,
            )  # fmt: skip
            plans = (first, larger)
            got = [(N, encode_first.topk_encode(x, W_enc, b_enc, k, p)) for p in plans]
        else:
            from . import encode_tiles

            got = [
                (rows, encode_tiles.topk_encode(x[:rows], W_enc, b_enc, k, tail))
                for rows, tail in ((N, 0), (269, 16), (288, 32))
            ]
    except torch.OutOfMemoryError:
        raise
    except (
        ImportError, AttributeError, AssertionError, KeyError, TypeError, ValueError, RuntimeError,
        TritonError,
    ) as e:  # fmt: skip
        reason = f"does not compile ({type(e).__name__}: {str(e)[:200]})"
    else:
        if all(torch.equal(want[i][:rows], pair[i]) for rows, pair in got for i in (0, 1)):
            return True
        reason = "disagrees with the plain one"
    warnings.warn(
        f"The encoder's {part} for Hopper GPUs {reason} under Triton {triton.__version__}; what "
        "serves every GPU, which is slower, is used.",
        stacklevel=2,
    )
    return False
