"""All designs of the encoder, decoder, gradients, dead latents and Adam at a small, ragged size:

compute-sanitizer --tool memcheck python tests/kernels/small_case.py
"""

from __future__ import annotations

import torch

from flash_sae_dist.kernels import (
    dead_products,
    dense_grad,
    encode,
    encode_flat,
    encode_plan,
    encode_rows,
    pair_order,
    sparse_adam,
    sparse_decode,
)
from flash_sae_dist.kernels.reference import (
    AdamOptions,
    DenseRows,
    Gradients,
    LatentRows,
    Limits,
    PairGradients,
)

N, D, F, K = 130, 72, 4104, 8


def dead(M: int, k: int) -> None:
    """Selection by a search and by given limits, and what follows it."""
    pre, bias = torch.randn(N, M, device="cuda"), torch.randn(M, device="cuda")
    prefix = torch.zeros(N, dtype=torch.int32, device="cuda")
    left = torch.full((N,), k, dtype=torch.int32, device="cuda")
    for shift in (24, 16, 8, 0):
        dead_products.pick_digits_(
            dead_products.digit_counts(pre, bias, prefix, shift), prefix, left
        )
    limits = Limits(prefix ^ -(2**31), left)
    for ghost in (False, True):
        args = (pre, bias, k, ghost, torch.bfloat16)
        acts = dead_products.select_dead(*args)
        assert torch.equal(acts, dead_products.select_dead(*args, limits))
        dead_products.select_dead(pre, bias, None, ghost, torch.bfloat16)
        W = torch.randn(M, D, device="cuda").bfloat16()
        residual, scale = torch.randn(N, D, device="cuda"), torch.tensor(0.1, device="cuda")
        recon = torch.mm(acts, W, out_dtype=torch.float32)
        rows, _ = dead_products.aux_rows(residual, recon, scale, ghost, torch.bfloat16)
        dead_products.mask_dead_grad_(rows @ W.T, acts, ghost)


def adam(F: int, D: int, K: int, M: int, *, flat: bool = False) -> None:
    """Both passes and the norm's, with heavy blocks, listed latents and bfloat16 moments."""
    W, copies = (torch.randn(2, F, D, device="cuda", dtype=t) for t in (None, torch.bfloat16))
    b, step = torch.randn(F, device="cuda"), torch.tensor(1.0, device="cuda")
    idx = torch.randint(0, F, (N, K), device="cuda", dtype=torch.int32)
    idx[:, 0] = F - 1
    coef = torch.randn(2, N * K, device="cuda")
    coef[:, ::3] = 0
    rows = torch.randn(2, N, D, device="cuda").bfloat16()
    order = pair_order.order_pairs(idx, F, coef[0])
    slots = torch.full((F,), -1, device="cuda", dtype=torch.int32)
    slots[torch.randperm(F, device="cuda")[:M]] = torch.arange(M, device="cuda").int()
    dense = DenseRows(slots, *torch.randn(2, M, D, device="cuda"), torch.randn(M, device="cuda"))
    tokens = torch.arange(N * K, device="cuda", dtype=torch.int32) // K if flat else None
    pairs = PairGradients(idx.flatten(), *coef, *rows, K, tokens)
    for dtype in (torch.float32, torch.bfloat16):
        moments = [(torch.zeros_like(W[0], dtype=dtype), b * 0, W[1].to(dtype) * 0) for _ in "mv"]
        latents = LatentRows(W[0], b, W[1], *moments, (copies[0], copies[1]))
        scalars = torch.tensor([1e-3, 1.0, 0.5, 1e-3], device="cuda")
        for lazy in (False, True):
            options = AdamOptions(lazy=lazy, scaled=lazy)
            for grads in (Gradients(pairs, order), Gradients(pairs, order, dense, bias=b)):
                sparse_adam.encoder_squares(latents, grads, options)
                sparse_adam.decoder_squares(latents, grads, options)
                sparse_adam.adam_encoder_(latents, grads, scalars, step, options, 7)
                sparse_adam.adam_decoder_(latents, grads, scalars, step, options, 7)


def flat_rules(design: encode.Design, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> None:
    """The batch rule and the threshold rule, also with lists and buffers that are too short."""
    room = 6 * N * K + 4096
    plan = None if design == "rows" else encode_plan.flat_plan(N, D, F, 2.5 * K, room)
    encode_flat.by_batch(x, W, b, design, plan, K, room)
    encode_flat.by_threshold(x, W, b, design, plan, b.abs(), N * K)
    encode_flat.by_batch(x, torch.zeros_like(W), torch.ones_like(b), design, plan, K, room)
    if plan is not None:
        encode_flat.by_batch(x, W, b, design, plan._replace(capacity=5), K, room)
        encode_flat.by_batch(x, W, b, design, plan, K, N * K // 2)


def flat_lists(x: torch.Tensor, W: torch.Tensor) -> None:
    """A list with unused slots, tokens without pairs, one with many."""
    counts = torch.tensor([0, 37, 0, 901, *[3] * (N - 6), 0, 5], device="cuda")
    offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    tokens = torch.arange(N, device="cuda").repeat_interleave(counts)
    latents, values = torch.randint(0, F, tokens.shape, device="cuda"), torch.rand(tokens.shape)
    tokens, latents = (torch.nn.functional.pad(t, (0, 77)).int() for t in (tokens, latents))
    values = torch.nn.functional.pad(values.cuda(), (0, 77))
    scale, b_dec = torch.tensor(0.1, device="cuda"), torch.zeros(D, device="cuda")
    flat = (tokens, offsets)
    sparse_decode.sparse_decode(values, latents, W, *flat)
    sparse_decode.gathered_dots(x, latents, W, *flat)
    sparse_decode.pair_coefs(values, latents, W, x, scale, *flat)
    sparse_decode.decode_coefs(values, latents, W, b_dec, x.float(), scale, *flat)
    dense_grad.scatter_rows(values, latents, x, F, tokens=tokens)


def main() -> None:
    x, W = (torch.randn(n, D, device="cuda").bfloat16() for n in (N, F))
    b, b_dec = torch.randn(F, device="cuda"), torch.zeros(D, device="cuda")
    values, indices = encode_rows.topk_encode(x, W, b, K)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    plan = encode_plan.make_plan(N, D, F, K)
    for design in ("plain", "hopper"):
        assert plan is not None
        if design == "plain" or hopper:
            encode.run(design, plan, x, W, b, K)
            # Limits too high, and lists too short.
            encode.run(design, plan._replace(rank=1), x, W, b, K)
            encode.run(design, plan._replace(capacity=5), x, W, b, K)
            # Equal activations.
            encode.run(design, plan, x, torch.zeros_like(W), torch.ones_like(b), K)
            flat_rules(design, x, W, b)
    flat_rules("rows", x, W, b)
    scale = torch.tensor(0.1, device="cuda")
    sparse_decode.decode_coefs(values, indices, W, b_dec, x.float(), scale)
    dense_grad.scatter_rows(values, indices, x, F)
    dead(72, 36)
    dead(1001, 36)
    # Several chunks, the last of them ragged.
    dead(2 * dead_products._MAX_BLOCK + 72, 2000)
    adam(517, D, K, 37)
    adam(130, 300, K, 130)
    adam(130, 300, K, 130, flat=True)
    flat_lists(x, W)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
