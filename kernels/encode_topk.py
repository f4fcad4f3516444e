"""Encoder matmul with an exact top-k in its epilogue: no [N, F] tensor exists. For few tokens a
matmul writes one of at most 63 MiB instead (encode_tiles.py, encode_blocked.py).

Legend: N tokens, D d_in, F d_sae (of this shard), K k, S the sampling stride.

The fused path for GPUs of any kind; encode_first.py has the one for Hopper.

1. `_gather_kernel` and `_sample_kernel` compute every S-th activation (one of each S neighbours,
   picked by a hash).
2. `_threshold_kernel` takes a row's r-th largest sample as threshold. r is such that the k largest
   activations reach it but for one row in 1e8, whatever the values are: only ranks matter, since
   equal values are ranked by index.
3. `_filter_kernel` is the whole matmul; its epilogue appends the activations that reach their row's
   threshold, on the fp32 accumulators, to short lists, several a row.
4. `encode_select.select_kernel` finds the exact k of a row's lists. Where they hold fewer than k
   activations, or one overflowed, the row is done anew by streaming over all latents: the result is
   exact in every case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import encode_blocked, encode_choice, encode_trial
from .encode_choice import Design, Shape
from .encode_first_plan import make_first_plan
from .encode_plan import (
    GATHERED_BYTES,
    QUADS,
    Plan,
    make_plan,
    tiles_are_first,
    tiles_fit,
)
from .encode_select import kth, relu_bits, select_kernel
from .shapes import cdiv, next_power_of_2, num_programs, num_stages


@triton.jit
def _sampled_latent(j, STRIDE: tl.constexpr):
    """Latent of the j-th sample: one of the STRIDE from j * STRIDE on, scattered so that no pattern
    of W meets it."""
    h = j.to(tl.uint32) * 0x9E3779B1
    return j * STRIDE + ((h >> 16) % STRIDE).to(tl.int32)


@triton.jit
def _gather_kernel(w_ptr, out_ptr, first, D, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Copies a block of columns of the weights of the samples from `first` on."""
    j = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    latent = _sampled_latent(first + j, STRIDE).to(tl.int64)
    w = tl.load(w_ptr + latent * D + d, mask=d < D, other=0.0)
    tl.store(out_ptr + j.to(tl.int64) * D + d, w, mask=d < D)


@triton.jit
def _sample_kernel(
    x_desc, w_desc, bias_ptr, out_ptr, N, D, first, num_samples, pitch,
    STRIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    m0 = tl.program_id(0) * BLOCK_M
    n0 = tl.program_id(1) * BLOCK_N
    rows = m0 + tl.arange(0, BLOCK_M)
    cols = first + n0 + tl.arange(0, BLOCK_N)
    latents = _sampled_latent(tl.minimum(cols, num_samples - 1), STRIDE)
    # Bias first, as in the filter: sums in the same order have the same bits, on which equal
    # activations depend.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + tl.load(bias_ptr + latents)[None, :]
    for d0 in range(0, D, BLOCK_K):
        a = x_desc.load([m0, d0])
        b = w_desc.load([n0, d0])
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    out = out_ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(out, acc, mask=(rows < N)[:, None] & (cols < num_samples)[None, :])


@triton.jit
def _threshold_kernel(
    samples_ptr, tau_ptr, last_ptr, num_samples, pitch, rank,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    v = tl.load(samples_ptr + row * pitch + cols, mask=cols < num_samples, other=0.0)
    bits = tl.where(cols < num_samples, relu_bits(v), -1)
    tau, last = kth(bits, _sampled_latent(cols, STRIDE), rank, rank // 8)
    # The NaN that a GPU's arithmetic makes, so that where none is to pass, none does.
    tau = tl.where(tau == 0x7FC00000, 0x7FFFFFFF, tau)
    tl.store(tau_ptr + row, tau)
    tl.store(last_ptr + row, last)


@triton.jit
def _append(
    acc, f, limit, count, row_lists, F, PARTS: tl.constexpr, CAPACITY: tl.constexpr,
):  # fmt: skip
    """Appends a piece's activations over their row's limit; returns the new lengths."""
    bits = acc.to(tl.int32, bitcast=True)
    hit = ((bits > limit[:, None]) & (f < F)[None, :]).to(tl.int32)
    slot = count[:, None] + tl.cumsum(hit, 1) - 1
    entry = (bits.to(tl.int64) << 32) | f.to(tl.int64)[None, :]
    keeps = (hit != 0) & (slot < CAPACITY)
    tl.store(row_lists[:, None] + slot * PARTS, entry, mask=keeps)
    return count + tl.sum(hit, 1)


@triton.jit
def _halves(acc):
    """The left and the right half of a tile's columns."""
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return acc.reshape(M, 2, N // 2).permute(0, 2, 1).split()


@triton.jit
def _filter_kernel(
    x_desc, w_desc, bias_ptr, tau_ptr, last_ptr, count_ptr, lists_ptr, pitch, N, F, D,
    PARTS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The filter for any GPU: a program keeps to a block of rows and every PARTS-th tile, and
    appends to one list a row, whose lengths it holds."""
    num_m = tl.cdiv(N, BLOCK_M)
    for unit in range(tl.program_id(0), num_m * PARTS, tl.num_programs(0)):
        part = unit // num_m
        m0 = (unit % num_m) * BLOCK_M
        rows = m0 + tl.arange(0, BLOCK_M)
        tau = tl.load(tau_ptr + rows, mask=rows < N, other=0x7FFFFFFF)
        last = tl.load(last_ptr + rows, mask=rows < N, other=-1)
        row_lists = lists_ptr + rows.to(tl.int64) * pitch + part
        count = tl.zeros((BLOCK_M,), tl.int32)
        for f0 in range(part * BLOCK_N, F, PARTS * BLOCK_N):
            f = f0 + tl.arange(0, BLOCK_N)
            bias = tl.load(bias_ptr + f, mask=f < F, other=float("-inf"))
            # + 0: a pre-activation of -0 would have a negative number's bits.
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32) + bias[None, :]
            for d0 in range(0, D, BLOCK_K):
                a = x_desc.load([m0, d0])
                b = w_desc.load([f0, d0])
                acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            limit = _limit(tau, last >= f0)
            # In quarters, which take fewer registers.
            left, right = _halves(acc)
            quarter = f0 + tl.arange(0, BLOCK_N // 4)
            for piece in tl.static_range(4):
                half = left if piece < 2 else right
                first, second = _halves(half)
                values = first if piece % 2 == 0 else second
                count = _append(
                    values, quarter + piece * (BLOCK_N // 4), limit, count, row_lists, F, PARTS,
                    CAPACITY,
                )  # fmt: skip
        tl.store(count_ptr + rows * PARTS + part, count, mask=rows < N)


@triton.jit
def _limit(tau, includes_equal):
    """Pre-activations whose bits exceed it pass: those from tau on, or only those over it.

    Equal values pass up to a latent, coarsely: in the whole tile that holds it. Where zeros pass,
    so do the negative values that ReLU makes zeros.
    """
    return tl.where(includes_equal, tl.where(tau == 0, -2147483648, tau - 1), tau)


def _sample(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, samples: Tensor, gathered: Tensor, first: int,
    plan: Plan, num_samples: int, precision: str,
) -> None:  # fmt: skip
    """Fills samples [rows, pitch] with the columns from `first` on whose weights are gathered."""
    (N, D), m, n, d = x.shape, plan.block_m, plan.sample_n, plan.block_k
    size = gathered.shape[0]
    _sample_kernel[(cdiv(N, m), cdiv(size, n))](
        TensorDescriptor.from_tensor(x, [m, d]), TensorDescriptor.from_tensor(gathered, [n, d]),
        b_enc, samples, N, D, first, min(num_samples, first + size), samples.stride(0),
        plan.stride, m, n, d, precision, num_warps=plan.sample_warps,
        num_stages=num_stages(x.device, (m + n) * d * x.element_size()),
    )  # fmt: skip


def fused_topk(
    x: Tensor,  # [N, D] bf16 or fp16, contiguous
    W_enc: Tensor,  # [F, D] of the same dtype, contiguous
    b_enc: Tensor,  # [F] float32
    k: int,
    plan: Plan,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """The fused path for any GPU, with the sizes of a plan."""
    N, D = x.shape
    F = W_enc.shape[0]
    values = torch.empty(N, k, dtype=torch.float32, device=x.device)
    indices = torch.empty(N, k, dtype=torch.int32, device=x.device)
    num_samples = F // plan.stride
    rows = min(cdiv(N, plan.block_m) * plan.block_m, plan.block_rows)
    scratch = torch.empty(rows, plan.pitch(F), dtype=torch.int64, device=x.device)
    samples = scratch.view(torch.float32)
    # A program's four lists as one, of as many entries together.
    lists, capacity = plan.parts, plan.capacity * QUADS
    count = torch.empty(rows, lists, dtype=torch.int32, device=x.device)
    tau, last = torch.empty(2, rows, dtype=torch.int32, device=x.device).unbind()
    # 16-bit inputs are exact in the tensor cores' fp32 sums whatever is named here.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    at_once = max(1, GATHERED_BYTES // (x.element_size() * D * plan.sample_n)) * plan.sample_n
    gathered = torch.empty(min(at_once, num_samples), D, dtype=x.dtype, device=x.device)
    for start in range(0, N, rows):
        part = x[start : start + rows]
        size = part.shape[0]
        for first in range(0, num_samples, at_once):
            some = gathered[: num_samples - first]
            if start == 0 or num_samples > at_once:
                block = min(1024, next_power_of_2(D))
                _gather_kernel[(some.shape[0], cdiv(D, block))](
                    W_enc, some, first, D, plan.stride, block, num_warps=2
                )
            _sample(part, W_enc, b_enc, samples, some, first, plan, num_samples, precision)
        _threshold_kernel[(size,)](
            samples, tau, last, num_samples, samples.stride(0), plan.rank,
            plan.stride, next_power_of_2(num_samples),
            num_warps=plan.threshold_warps,
        )  # fmt: skip
        _filter(part, W_enc, b_enc, tau, last, count, scratch, plan, capacity, precision)
        select_kernel[(size,)](
            part, W_enc, b_enc, count, scratch, scratch.stride(0), lists, values[start:],
            indices[start:], F, D, k, capacity, next_power_of_2(lists), plan.keys,
            next_power_of_2(k), min(32, plan.keys // 2), 64, num_warps=plan.select_warps,
        )  # fmt: skip
    return values, indices


def _filter(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, tau: Tensor, last: Tensor, count: Tensor,
    scratch: Tensor, plan: Plan, capacity: int, precision: str,
) -> None:  # fmt: skip
    m, n, d = plan.block_m, min(128, plan.block_n), plan.block_k
    _filter_kernel[(num_programs(x.device),)](
        TensorDescriptor.from_tensor(x, [m, d]), TensorDescriptor.from_tensor(W_enc, [n, d]),
        b_enc, tau, last, count, scratch, scratch.stride(0), x.shape[0], W_enc.shape[0],
        x.shape[1], plan.parts, capacity, m, n, d, precision,
        num_warps=plan.num_warps,
        num_stages=num_stages(x.device, (m + n) * d * x.element_size()),
    )  # fmt: skip


def _aligned(t: Tensor) -> Tensor:
    """Contiguous from a 16-byte boundary on, which the copy engine asks for."""
    t = t.contiguous()
    if t.ndim == 2:
        # A single row is contiguous whatever its stride says, which the copy engine reads.
        t = t.as_strided(t.shape, (t.shape[1], 1))
    return t if t.data_ptr() % 16 == 0 else t.clone()


def designs(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F] float32; all from 16-byte boundaries on, contiguous
    k: int,
) -> dict[str, Design]:
    """The designs that take a call's inputs, the one to take first by an H100's times: `tiles`, for
    few tokens on Hopper; `fused` (`fused-plain` on other GPUs), where sampling pays; `library`, in
    blocks of rows, for all."""
    N, D, F = *x.shape, W_enc.shape[0]
    library: dict[str, Design] = {"library": lambda: encode_blocked.topk_encode(x, W_enc, b_enc, k)}
    if N == 0 or x.dtype == torch.float32:
        return library
    found: dict[str, Design] = {}
    if tiles_fit(N, D, F, k) and encode_trial.runs("tiles", x.device, x.dtype):
        from . import encode_tiles

        found["tiles"] = lambda: encode_tiles.topk_encode(x, W_enc, b_enc, k)
    fused: dict[str, Design] = {}
    first = None
    if encode_trial.runs("filter", x.device, x.dtype):
        first = make_first_plan(N, D, F, k, num_programs(x.device))
    if first is not None:
        from . import encode_first

        fused["fused"] = lambda: encode_first.topk_encode(x, W_enc, b_enc, k, first)
    elif (plan := make_plan(N, D, F, k, num_programs(x.device))) is not None:
        fused["fused-plain"] = lambda: fused_topk(x, W_enc, b_enc, k, plan)
    else:
        return found | library
    if found and first is not None and not tiles_are_first(N, F, num_programs(x.device)):
        return fused | library | found
    return found | (library | fused if encode_blocked.is_faster(N, D, F, k) else fused | library)


def tune(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Shape, str]:
    """The shape of a call and its fastest design, by `encode_choice.tune`; `encode_choice.use` puts
    it into effect. Waits for the device."""
    x, W_enc, b_enc = _aligned(x), _aligned(W_enc), _aligned(b_enc.float())
    shape = Shape.of(x, W_enc, k)
    found = designs(x, W_enc, b_enc, k)
    return shape, encode_choice.tune(shape, found, device=x.device)


def topk_encode(
    x: Tensor,  # [N, D] bf16, fp16 or fp32
    W_enc: Tensor,  # [F, D] of the same dtype
    b_enc: Tensor,  # [F]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] float32 descending, [N, k] int32
    """`reference.topk_encode` on a GPU, by the design that encode_choice.py picks."""
    x, W_enc, b_enc = _aligned(x), _aligned(W_enc), _aligned(b_enc.float())
    calls = designs(x, W_enc, b_enc, k)
    return calls[encode_choice.pick(Shape.of(x, W_enc, k), calls)]()
