"""All designs of the encoder, second list, decoder and gradients at a small, ragged size:

compute-sanitizer --tool memcheck python tests/kernels/small_case.py
"""

from __future__ import annotations

import torch

from flash_sae_dist.kernels import (
    decode_backward,
    dense_grad,
    encode_aux,
    encode_plan,
    encode_topk,
    sparse_decode,
)

N, D, F, K = 130, 72, 4104, 8


def main() -> None:
    x, W = (torch.randn(n, D, device="cuda").bfloat16() for n in (N, F))
    b, b_dec = torch.randn(F, device="cuda"), torch.zeros(D, device="cuda")
    plan = encode_plan.make_plan(N, D, F, K)
    assert plan is not None
    hopper = torch.cuda.get_device_capability() == (9, 0)
    values, indices = encode_topk.fused_topk(x, W, b, K, plan)
    for by_warps in {False, hopper}:
        mask = torch.rand(F, device="cuda") < 0.9
        encode_aux.masked_topk(x, W, b, mask, D // 2, by_warps=by_warps)
    for design in encode_topk.designs(x, W, b, K).values():
        design()
    if hopper:
        from flash_sae_dist.kernels import encode_first, encode_tiles
        from flash_sae_dist.kernels.encode_first_plan import make_first_plan

        # With the last tokens beside whole blocks.
        more = x.repeat(3, 1)
        encode_tiles.topk_encode(more[:269], W, b, K, 16)
        encode_tiles.topk_encode(more[:288], W, b, K, 32)
        # Two warps a row.
        first = make_first_plan(N, D, F, 64)
        assert first is not None
        encode_first.topk_encode(x, W, b, 64, first._replace(warps=2))
        blocks = make_first_plan(256, D, F, 64)
        assert blocks is not None
        encode_first.topk_encode(more[:269], W, b, 64, blocks._replace(tail=16, held=832))
        encode_tiles.topk_encode(more, W, b, 64)
    scale = torch.tensor(0.1, device="cuda")
    sparse_decode.decode_coefs(values, indices, W, b_dec, x.float(), scale)
    dense_grad.scatter_rows(values, indices, x, F)
    decode_backward.decode_backward(values, indices, W, x)
    torch.cuda.synchronize()
    print("done")


if __name__ == "__main__":
    main()
