"""Compiles the kernels for compute capability 9.0 on any machine: a GPU is needed to run them, not
to compile them. Prints a line a kernel: name, bytes of spilled registers' stack, shared memory,
registers a thread, bytes of instructions.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
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
    encode_first,
    encode_hopper,
    encode_pick,
    encode_plan,
    encode_rows,
    encode_select,
    encode_tiles,
    encode_topk,
    pair_order,
    sparse_adam,
    sparse_decode,
)

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Hopper:
    """What a compiler asks of a driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

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


def main() -> None:
    driver.set_active(Hopper())
    bf16 = torch.empty(256, 768, dtype=torch.bfloat16)
    f32, i32 = torch.empty(64), torch.empty(64, dtype=torch.int32)
    i64 = torch.empty(64, dtype=torch.int64)
    h = encode_hopper
    for dtype in (torch.bfloat16, torch.float16):
        x = bf16.to(dtype)
        args = (h.descriptor(x, 64, 64), h.descriptor(x, 256, 64))
        runs = h.descriptor(x.view(32, 8, 768), 32, 8, 64)
        biases = (h.rows_descriptor(torch.empty(32, 8), 32, 8), h.descriptor(torch.empty(256), 256))
        whole = dtype == torch.bfloat16  # the other type differs in an instruction's name
        for parts, others, first, cells, tail in (
            (16, False, 1, 1, 0), (4, False, 2, 2, 0), (16, False, 1, 2, 0), (18, False, 4, 1, 0),
            (9, True, 1, 4, 0), (22, False, 1, 2, 16),
        )[: None if whole else 1]:  # fmt: skip
            kernel = encode_first.filter_kernel.warmup(
                args[0], runs, args[1], *biases, h.descriptor(x, tail or 64, 64), i32, i32, i32,
                i32, i64, f32, f32, i32, 1536, 256, 9, 256, 768, 1, 1, 2, 20, parts, others,
                parts + others, first, cells, 64, 24, parts < 16, tail, h.BLOCK_M, h.BLOCK_N,
                h.BLOCK_K, h.STAGES, h.LEAD, num_warps=4,
                launch_cooperative_grid=True, grid=(132,),
            )  # fmt: skip
            report(f"filter-hopper-{parts}-{others}-{first}-{cells}-{tail}-{dtype}", kernel)
        for tail in (0, 16, 32) if whole else (0,):
            kernel = encode_tiles._tiles_kernel.warmup(
                args[0], args[1], h.descriptor(torch.empty(256), 256),
                h.descriptor(x, tail or 64, 64), f32, f32, i32, 256, 256, 768, 64, h.BLOCK_M,
                h.BLOCK_N, h.BLOCK_K, h.STAGES, h.LEAD, encode_plan.GROUP, tail, num_warps=4,
                grid=(132,),
            )  # fmt: skip
            report(f"tiles-{tail}-hopper-{dtype}", kernel)
    for lists, held, size, k, warps, groups in (
        (16, 1152, 64, 32, 1, 0), (44, 704, 128, 100, 1, 0), (44, 704, 128, 100, 2, 0),
        (128, 4480, 512, 500, 1, 0), (128, 4480, 512, 500, 2, 0), (88, 960, 256, 256, 2, 2048),
    ):  # fmt: skip
        kernel = encode_pick.pick_kernel.warmup(
            bf16, bf16, f32, i32, i64, 1536, i32, i32, i32, f32, i32, f32, i32, 24576, 768, k,
            95, 4096, lists, 80, 8, held, size, 1024, size, 32, 64, 4 * lists, 512, 128, warps == 1,
            groups, groups, warps, num_warps=warps, maxnreg=128 // warps, grid=(1,),
        )  # fmt: skip
        report(f"pick-{lists}-{held}-{size}-{warps}-{groups}", kernel)
    for groups, size, k, warps in (
        (512, 32, 20, 1), (512, 256, 256, 1), (512, 256, 256, 2), (2048, 128, 64, 2),
        (2048, 512, 500, 2),
    ):  # fmt: skip
        room = encode_plan.groups_room(k, warps)
        kernel = encode_pick.pick_groups_kernel.warmup(
            f32, i32, 32 * groups, i64, f32, i32, 32 * groups, k, groups, groups, room, size, 1024,
            size, warps, num_warps=warps, grid=(1,),
        )  # fmt: skip
        report(f"pick-groups-{groups}-{size}-{warps}", kernel)
    desc = TensorDescriptor.from_tensor(bf16, [128, 64])
    kernel = encode_topk._filter_kernel.warmup(
        desc, desc, f32, i32, i32, i32, i64, 1536, 256, 256, 768, 4, 256, 128, 128, 64, "tf32",
        num_warps=8, num_stages=4, grid=(132,),
    )  # fmt: skip
    report("filter", kernel)
    kernel = encode_topk._sample_kernel.warmup(
        desc, desc, f32, f32, 256, 768, 0, 1024, 2048, 24, 128, 128, 64, "tf32", num_warps=4,
        num_stages=4, grid=(1, 1),
    )  # fmt: skip
    report("sample", kernel)
    kernel = encode_topk._threshold_kernel.warmup(
        f32, i32, i32, 1024, 2048, 13, 24, 1024, num_warps=1, grid=(1,)
    )
    report("threshold", kernel)
    kernel = encode_select.select_kernel.warmup(
        bf16, bf16, f32, i32, i64, 1536, 16, f32, i32, 24576, 768, 32, 96, 16, 512, 32, 32, 64,
        num_warps=1, grid=(1,),
    )  # fmt: skip
    report("select", kernel)
    for F, k, find in (
        (16384, 20, False),
        (65536, 64, False),
        (16384, 20, True),
        (1 << 20, 64, True),
    ):
        sizes = encode_plan.group_sizes(F, k, None if find else encode_plan.GROUP)
        assert sizes is not None
        kernel = encode_rows._groups_kernel.warmup(
            f32, f32, i32, i32, i64, f32, i32, F, F // sizes.size, F, k, find, sizes.step,
            sizes.groups_pow2, sizes.size, sizes.k_pow2, num_warps=sizes.num_warps, grid=(1,),
        )  # fmt: skip
        report(f"groups-{F}-{find}", kernel)
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
    for name, dots, tokens in (
        ("decode-backward", True, None), ("scatter-rows", False, None),
        ("scatter-rows-flat", False, i32),
    ):  # fmt: skip
        kernel = dense_grad.latents_kernel.warmup(
            i64, i32, f32, bf16, tokens, bf16, f32, f32, bf16, 65536, 4096, 65536, 64, dots, 64,
            **dense_grad.latents_blocks(65536, 4096)[1], num_warps=1, grid=(1,),
        )  # fmt: skip
        report(name, kernel)
    constants = (0.1, 0.999, 0.001, 6e-10, 0, 0)
    step = torch.zeros(())
    for D in (768, 4096):
        for what, scaled, dense, norm, tokens in (
            ("", False, False, False, None), ("-dense-scaled", True, True, False, None),
            ("-dense-norm", False, True, True, None), ("-flat", False, False, False, i32),
        ):  # fmt: skip
            flags = {"LAZY": False, "SCALED": scaled, "DENSE": dense, "NORM": norm}
            flags |= {"COPIES": True, "HEAVY": 64}
            kernel = sparse_adam._encoder_kernel.warmup(
                i32, i32, f32, bf16, tokens, f32, f32, i32, f32, f32, f32, f32, f32, bf16, f32, f32,
                f32, f32, f32, f32, step, 24576, D, 131072, 32, *constants, 1.0, 1e-9, **flags,
                **sparse_adam._encoder_blocks(24576, D), grid=(1, 1),
            )  # fmt: skip
            report(f"adam-encoder-{D}{what}", kernel)
            kernel = sparse_adam._decoder_kernel.warmup(
                i32, i32, f32, bf16, tokens, f32, f32, i32, f32, f32, f32, f32, f32, bf16, f32, f32,
                step, D, 32, *constants, UNIT_NORM=True, **flags, **sparse_adam._decoder_blocks(D),
                grid=(1,),
            )  # fmt: skip
            report(f"adam-decoder-{D}{what}", kernel)
        for what, flat in (("", (None, None)), ("-flat", (i32, i32))):
            kernel = sparse_decode._decode_kernel.warmup(
                f32, i32, bf16, bf16, flat[1], f32, f32, f32, f32, D, 64,
                **sparse_decode._decode_coefs_blocks(D, 64), grid=(1, 1),
            )  # fmt: skip
            report(f"decode-coefs-{D}{what}", kernel)
            kernel = sparse_decode._coefs_kernel.warmup(
                f32, f32, f32, f32, f32, *flat, 1024, 65536, 64, 32, BLOCK=512, grid=(1,)
            )
            report(f"coefs-{D}{what}", kernel)
            kernel = sparse_decode._dots_kernel.warmup(
                bf16, i32, bf16, f32, f32, f32, f32, *flat, 1024, D, 64, COEFS=True,
                **sparse_decode._dots_blocks(D, 64), grid=(1, 1),
            )  # fmt: skip
            report(f"dots-{D}{what}", kernel)
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
