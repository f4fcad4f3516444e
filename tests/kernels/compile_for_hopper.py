"""Compiles the kernels for compute capability 9.0, and the encoder's portable ones for other GPUs,
on any machine: a GPU is needed to run them, not to compile them. Prints a line a kernel: name,
bytes of spilled registers' stack, shared memory, registers a thread, bytes of instructions; of
other GPUs the name alone.
"""

from __future__ import annotations

import itertools
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from flash_sae_dist.kernels import (
    dead_products,
    dense_grad,
    encode,
    encode_candidates,
    encode_filter,
    encode_flat,
    encode_fp8,
    encode_hopper,
    encode_plan,
    encode_rows,
    encode_select,
    pair_order,
    sparse_adam,
    sparse_decode,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


OTHERS = (
    GPUTarget("cuda", 80, 32), GPUTarget("cuda", 89, 32), GPUTarget("cuda", 100, 32),
    GPUTarget("hip", "gfx942", 64),
)  # fmt: skip


class Driver:
    """What a compiler asks of a driver."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # A kernel asks a device for its kind once.
        return hash(self.target.arch)

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def report(name: str, kernel: Any) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True
        ).stdout
    stack, registers = re.search(r"STACK:(\d+)", usage), re.search(r"REG:(\d+)", usage)
    assert stack is not None, usage
    assert registers is not None, usage
    print(name, stack[1], kernel.metadata.shared, registers[1], code_bytes(kernel.asm["cubin"]))


def code_bytes(cubin: bytes) -> int:
    """Size of an ELF64 file's sections of instructions."""
    (start,) = struct.unpack_from("<Q", cubin, 40)
    size, count = struct.unpack_from("<HH", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, start + i * size) for i in range(count)]
    return sum(length for *_, flags, _, _, length in sections if flags & 4)


def portable_encoder(say: Callable[[str, Any], None], num_stages: int, *, fp8: bool) -> None:
    """The encoder's kernels for GPUs of any kind, and those that need e4m3 products."""
    bf16 = torch.empty(256, 768, dtype=torch.bfloat16)
    f32, i32 = torch.empty(64), torch.empty(64, dtype=torch.int32)
    i64 = torch.empty(64, dtype=torch.int64)
    m, n, d = encode_plan.BLOCK_M, encode_plan.BLOCK_N, encode_filter.BLOCK_K
    x = TensorDescriptor.from_tensor(bf16, [m, d])
    runs = TensorDescriptor.from_tensor(bf16.view(n // 8, -1, 768), [n // 8, 8, d])
    rest = TensorDescriptor.from_tensor(bf16, [n, d])
    filters = [("", (x, runs, rest), None, d)]
    if fp8:
        e4m3, d = bf16.to(torch.float8_e4m3fn), 2 * d
        x = TensorDescriptor.from_tensor(e4m3, [m, d])
        runs = TensorDescriptor.from_tensor(e4m3.view(n // 8, -1, 768), [n // 8, 8, d])
        rest = TensorDescriptor.from_tensor(e4m3, [n, d])
        filters.append(("-fp8", (x, runs, rest), f32, d))
        kernel = encode_fp8.quantise_kernel.warmup(
            bf16, e4m3, f32, 768, encode_fp8.LARGEST, encode_fp8.LEAST_SCALE, 1024, num_warps=4,
            grid=(1,),
        )  # fmt: skip
        say("quantise", kernel)
        for scale in (None, f32):
            kernel = encode_fp8.pick_kernel.warmup(
                f32, i32, f32, scale, f32, i32, 128, 64, 128, num_warps=1, grid=(1,)
            )
            say(f"pick-{scale is None}", kernel)
    for (what, operands, scale, d), write in itertools.product(filters, (True, False)):
        kernel = encode_filter.filter_kernel.warmup(
            *operands, f32, i32, i32, i32, scale, scale, 2928, 50, 4096, 24576, 768, 192, 7, 4,
            192, 4, write, m, n, d, "tf32", encode_plan.CELL, num_warps=8, num_stages=num_stages,
            grid=(132,),
        )  # fmt: skip
        say(("write" if write else "filter") + what, kernel)
    for N, D, F, k in ((4096, 768, 24576, 32), (1024, 4096, 65536, 64), (4096, 2304, 16384, 256)):
        plan = encode_plan.make_plan(N, D, F, k)
        assert plan is not None
        kernel = encode_select.limit_kernel.warmup(
            i32, i32, i64, i32, plan.pitch, plan.whole, 7, plan.rank, plan.slack,
            plan.sample_keys, plan.sample, encode_plan.next_power_of_2(plan.sample),
            encode_plan.next_power_of_2(plan.rank + plan.slack), plan.block_n, encode_plan.CELL,
            num_warps=encode.limit_warps(plan), grid=(1,),
        )  # fmt: skip
        say(f"limit-{plan.sample}", kernel)
        kernel = encode_select.select_kernel.warmup(
            i32, i64, i32, i32, i32, i32, f32, i32, plan.pitch, plan.sample_keys,
            plan.capacity, F, k,
            **encode.select_sizes(plan, k), num_warps=encode.select_warps(plan), grid=(1,),
        )  # fmt: skip
        say(f"select-{F}-{k}", kernel)
    flat_encoder(say)
    kernel = encode_select.mend_kernel.warmup(
        bf16, bf16, f32, None, i32, i32, f32, i32, 1600, 4096, 24576, 768, 32, 32, 32, 32, 64,
        num_warps=8, grid=(1,),
    )  # fmt: skip
    say("mend", kernel)
    for F, k in ((16384, 20), (1 << 20, 64)):
        sizes = encode_rows.group_sizes(F, k)
        assert sizes is not None
        kernel = encode_rows._groups_kernel.warmup(
            f32, f32, i32, i32, i64, f32, i32, F, F // sizes.size, F, k, sizes.step,
            sizes.groups_pow2, sizes.size, sizes.k_pow2, num_warps=sizes.num_warps, grid=(1,),
        )  # fmt: skip
        say(f"groups-{F}", kernel)


def flat_encoder(say: Callable[[str, Any], None]) -> None:
    """The batch rule's and the threshold rule's."""
    bf16 = torch.empty(256, 768, dtype=torch.bfloat16)
    f32, i32 = torch.empty(64), torch.empty(64, dtype=torch.int32)
    i64 = torch.empty(64, dtype=torch.int64)
    c, f = encode_candidates, encode_flat
    N, D, F, k = 4096, 768, 24576, 32
    sample = f.sample_of(N, F, k)
    kernel = c.limit_kernel.warmup(
        f32, f32, i32, i32, i32, N, sample.size, sample.step, sample.rank, N * k, sample.group, 128,
        num_warps=4, grid=(1, 1),
    )  # fmt: skip
    say("flat-limit", kernel)
    plan = encode_plan.flat_plan(N, D, F, 2.5 * k, 6 * N * k)
    assert plan is not None
    pow2 = encode_plan.next_power_of_2(plan.lists)
    kernel = c.collect_kernel.warmup(
        i32, i32, i32, i64, i32, i32, i32, i32, plan.pitch, plan.capacity, 6 * N * k, 0, N, F,
        plan.lists, pow2, plan.keys // pow2, True, num_warps=1, grid=(1,),
    )  # fmt: skip
    say("flat-collect", kernel)
    for given in (False, True):
        for mode, name in enumerate(("round", "count", "emit")):
            kernel = c.flat_kernel.warmup(
                bf16, bf16, f32, f32, i64, i32, i32, f32, i32, i32, i32, i32, i32, f32, i32, i32, 1,
                N * k, 512, 0, 0, 500, 776, N, F, D, mode, given, f._TOKENS, 128, f._SPANS, f._ROWS,
                f._COLS, f._DEPTH, "tf32", num_warps=4, grid=(1,),
            )  # fmt: skip
            say(f"flat-{name}-{given}", kernel)


def hopper_encoder() -> None:
    """Both forms of the filter that is for Hopper alone."""
    i32, bias = torch.empty(64, dtype=torch.int32), torch.empty(520)
    h, n = encode_hopper, encode_plan.BLOCK_N
    for dtype in (torch.bfloat16, torch.float16, torch.float8_e4m3fn):
        W = torch.empty(520, 768, dtype=dtype)
        block_k, scale = 128 // W.element_size(), bias if W.element_size() == 1 else None
        vectors = (
            h.descriptor(bias[:512].view(n // 8, 16), n // 8, 8, swizzle=False),
            h.descriptor(bias, n),
        )
        weights = (
            h.descriptor(W[:512].view(n // 8, 16, 768), n // 8, 8, block_k),
            h.descriptor(W, n, block_k),
            *vectors, *((None, None) if scale is None else vectors),
        )  # fmt: skip
        for write in (True, False):
            kernel = h.hopper_kernel.warmup(
                h.descriptor(W, 64, block_k), *weights, i32, i32, i32, scale, 1600, 50,
                256, 768, 2, 1, 1, 3, 4, write, encode_plan.BLOCK_M, n, block_k, h.STAGES,
                h.LEAD, num_warps=4, grid=(132,),
            )  # fmt: skip
            report(f"hopper-{'write' if write else 'filter'}-{dtype}", kernel)


def main() -> None:
    for target in OTHERS:
        driver.set_active(Driver(target))
        fp8 = target.arch in (89, 100)
        portable_encoder(lambda name, _, at=target.arch: print(f"{at}-{name}"), 2, fp8=fp8)
    driver.set_active(Driver(GPUTarget("cuda", 90, 32)))
    bf16 = torch.empty(256, 768, dtype=torch.bfloat16)
    f32, i32 = torch.empty(64), torch.empty(64, dtype=torch.int32)
    i64 = torch.empty(64, dtype=torch.int64)
    hopper_encoder()
    portable_encoder(report, 4, fp8=True)
    kernel = pair_order._count_kernel.warmup(
        i32, f32, i32, i32, 65536, 65536, HAS_COEF=True, BLOCK=256, grid=(1,)
    )
    report("count", kernel)
    kernel = pair_order._sum_counts_kernel.warmup(
        i32, i32, 65536, SPAN=1024, BEFORE=4096, grid=(1,)
    )
    report("sum-counts", kernel)
    kernel = pair_order._place_kernel.warmup(i32, i32, i32, i32, 65536, BLOCK=256, grid=(1,))
    report("place", kernel)
    kernel = pair_order._rank_kernel.warmup(
        i32, i32, i32, i32, i32, 65536, 65536, BLOCK=128, WIDTH=128, grid=(1,)
    )
    report("rank", kernel)
    for name, tokens in (("scatter-rows", None), ("scatter-rows-flat", i32)):
        kernel = dense_grad.latents_kernel.warmup(
            i64, i32, f32, bf16, tokens, f32, f32, bf16, 65536, 4096, 65536, 64, HEAVY=64,
            **dense_grad.latents_blocks(65536, 4096)[1], num_warps=1, grid=(1,),
        )  # fmt: skip
        report(name, kernel)
    constants = (0.1, 0.999, 0.001, 6e-10, 0, 0)
    step = torch.zeros(())
    for D in (768, 4096):
        for what, scaled, dense, norm, tokens, sign in (
            ("", False, False, False, None, False),
            ("-dense-scaled", True, True, False, None, False),
            ("-dense-norm", False, True, True, None, False),
            ("-flat", False, False, False, i32, False),
            ("-sign", False, False, False, None, True),
        ):  # fmt: skip
            flags = {"LAZY": False, "SCALED": scaled, "DENSE": dense, "NORM": norm}
            flags |= {"COPIES": True, "HEAVY": 64, "DECAYS": scaled, "SIGN": sign}
            kernel = sparse_adam._encoder_kernel.warmup(
                i32, i32, f32, bf16, tokens, f32, f32, i32, f32, f32, f32, f32, f32, bf16, f32, f32,
                f32, None if tokens is None else f32, f32, f32, f32, step, 24576, D, 131072, 32,
                *constants, 1.0, 1e-9, 0.01,
                **flags, **sparse_adam._encoder_blocks(24576, D), grid=(1, 1),
            )  # fmt: skip
            report(f"adam-encoder-{D}{what}", kernel)
            kernel = sparse_adam._decoder_kernel.warmup(
                i32, i32, f32, bf16, tokens, f32, f32, i32, f32, f32, f32, f32, f32, bf16, f32, f32,
                step, D, 32, *constants, 0.01, UNIT_NORM=True, RENORM=not sign, **flags,
                **sparse_adam._decoder_blocks(D), grid=(1,),
            )  # fmt: skip
            report(f"adam-decoder-{D}{what}", kernel)
        for what, flat in (("", (None, None)), ("-flat", (i32, i32))):
            for levels in (1, 5):
                kernel = sparse_decode._decode_dots_kernel.warmup(
                    f32, i32, bf16, bf16, bf16, flat[1], i32 if levels > 1 else None, f32, f32,
                    f32, f32, 1024, D, 64, (1.0 / levels,) * levels, levels - 1, levels == 1,
                    **sparse_decode._decode_coefs_blocks(D, 64), grid=(1, 1),
                )  # fmt: skip
                report(f"decode-dots-{levels}-{D}{what}", kernel)
            kernel = sparse_decode._coefs_kernel.warmup(
                f32,
                f32,
                f32,
                f32,
                f32,
                *flat,
                1024,
                65536,
                64,
                32,
                EVERY=True,
                BLOCK=512,
                grid=(1,),
            )
            report(f"coefs-{D}{what}", kernel)
            kernel = sparse_decode._dots_kernel.warmup(
                bf16, i32, bf16, f32, f32, f32, f32, *flat, 1024, D, 64, COEFS=True,
                **sparse_decode._dots_blocks(D, 64), grid=(1, 1),
            )  # fmt: skip
            report(f"dots-{D}{what}", kernel)
        kernel = sparse_decode._nested_kernel.warmup(
            bf16, f32, f32, bf16, bf16, f32, 1024, D, (0.2,) * 5, 4,
            sparse_decode.next_power_of_2(D), num_warps=4, grid=(1,),
        )  # fmt: skip
        report(f"nested-{D}", kernel)
    for M, k in ((832, 384), (13120, 2048), (43712, 2048)):
        block = min(dead_products._MAX_BLOCK, dead_products.next_power_of_2(M))
        for search in (True, False):
            keys = f32 if search else i32
            kernel = dead_products._select_kernel.warmup(
                f32, f32, keys, keys, bf16, M, k, 1.0, 0.1,
                SEARCH=search, GIVEN=not search, RELU=True, BLOCK=block,
                CHUNKS=-(-M // block), num_warps=max(1, min(16, block // 1024)),
                grid=(1,),
            )  # fmt: skip
            report(f"dead-select-{M}-{search}", kernel)
    kernel = dead_products._digits_kernel.warmup(
        f32, f32, i32, i32, 13120, SHIFT=16, BLOCK=2048, num_warps=4, grid=(1,)
    )
    report("dead-digits", kernel)
    kernel = dead_products._pick_kernel.warmup(i32, i32, i32, num_warps=1, grid=(1,))
    report("dead-pick", kernel)
    for ghost in (False, True):
        kernel = dead_products._rows_kernel.warmup(
            bf16, f32, f32, bf16, f32, 4096, GHOST=ghost, BLOCK=4096, num_warps=8, grid=(1,)
        )
        report(f"dead-rows-{ghost}", kernel)
        kernel = dead_products._mask_kernel.warmup(
            bf16, bf16, f32, 8192, 13120, GHOST=ghost, TURNS=16, ROWS=4, BLOCK=256, num_warps=4,
            grid=(1, 1),
        )  # fmt: skip
        report(f"dead-mask-{ghost}", kernel)


if __name__ == "__main__":
    main()
