"""The one place that chooses between a Triton kernel and the plain PyTorch reference."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import reference

# Operation -> the file of this folder that holds its Triton implementation, under the reference's
# name.
KERNEL_FILES: dict[str, str] = {
    "topk_encode": "encode",
    "batch_topk_encode": "encode_flat",
    "threshold_encode": "encode_flat",
    "fp8_topk_encode": "encode_fp8",
    "quantise_rows": "encode_fp8",
    "sparse_decode": "sparse_decode",
    "by_level": "sparse_decode",
    "decode_coefs": "sparse_decode",
    "gathered_dots": "sparse_decode",
    "pair_coefs": "sparse_decode",
    "nested_rows": "sparse_decode",
    "jump_acts": "jump",
    "jump_grads": "jump",
    "order_pairs": "pair_order",
    "scatter_rows": "dense_grad",
    "heavy_sums": "sparse_grad",
    "adam_encoder_": "sparse_adam",
    "adam_decoder_": "sparse_adam",
    "adam_scalars_": "adam_scalars",
    "adam_vector_": "adam_scalars",
    "count_fired_": "adam_scalars",
    "centre": "centre",
    "token_sums": "centre",
    "encoder_squares": "sparse_adam",
    "decoder_squares": "sparse_adam",
    "clip_": "adam_scalars",
    "select_dead": "dead_products",
    "digit_counts": "dead_products",
    "pick_digits_": "dead_products",
    "aux_rows": "dead_products",
    "mask_dead_grad_": "dead_products",
}
_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@cache
def has_triton() -> bool:
    """Whether the kernels can be compiled."""
    return importlib.util.find_spec("triton") is not None


def use_kernels(x: Tensor) -> bool:
    """True where the Triton kernels serve a tensor: on a CUDA device, in bf16, fp16 or fp32, with
    triton installed.
    """
    return x.is_cuda and x.dtype in _KERNEL_DTYPES and has_triton()


@cache
def fp8_obstacle(device: torch.device) -> str | None:
    """Why a device has no e4m3 products; None where it has, or is a CPU, which emulates them."""
    if device.type == "cpu":
        return None
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 9):
            return None
        return (
            f"fp8 needs a GPU of compute capability 8.9 or newer (Ada, Hopper), not {major}.{minor}"
        )
    return f"fp8 needs a GPU of NVIDIA's since Ada, not {device.type}"


def on_device(like: Tensor) -> AbstractContextManager[Any]:
    """Makes a tensor's CUDA device the current one, on which kernels are launched."""
    if like.is_cuda and like.device.index != torch.cuda.current_device():
        return torch.cuda.device(like.device)
    return nullcontext()


def implementation(
    name: str,
    x: Tensor,
) -> Callable[..., Any]:
    """The function that computes operation `name` for tensors like x: a Triton kernel's host
    function or the reference.
    """
    if name in KERNEL_FILES and use_kernels(x):
        # Imported here, so that a machine without triton can use everything else.
        return getattr(importlib.import_module(f"{__package__}.{KERNEL_FILES[name]}"), name)  # type: ignore[no-any-return]
    return getattr(reference, name)  # type: ignore[no-any-return]
