"""The order of a list's pairs that the decoder's and the encoder's gradients share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_sae_dist.kernels import eager, ops, reference


def test_an_order_is_taken_once_and_for_its_own_indices_alone() -> None:
    indices = torch.tensor([[3, 1], [0, 3]], dtype=torch.int32)
    order = reference.order_pairs(indices, 5)
    for change in ("none", "latents", "indices"):
        shared = eager._Shared()
        assert shared.take(indices, 5) is None
        shared.give(order, indices, 5, None)
        if change == "indices":
            indices += 0
        taken = shared.take(indices, 6 if change == "latents" else 5)
        assert (taken is order) == (change == "none")
        assert shared.take(indices, 5) is None


@pytest.mark.gpu
def test_one_order_serves_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    N, D, F, k = 300, 264, 5000, 16
    x = torch.randn(N, D, device="cuda")
    W = [torch.randn(F, D, device="cuda").requires_grad_() for _ in range(2)]
    b = torch.zeros(F, device="cuda", requires_grad=True)
    names: list[str] = []
    compute = eager.compute

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return compute(name, *args)

    monkeypatch.setattr(eager, "compute", counted)
    for _ in range(3):
        top = ops.topk_encode(x, W[0], b, k)
        names.clear()
        loss = (ops.sparse_decode(top.values, top.indices, W[1]) - x).square().sum()
        got = torch.autograd.grad(loss, [*W, b])
        assert names.count("order_pairs") == 1
    pre = x @ W[0].T + b
    values = pre.gather(1, top.indices.long()).relu()
    dense = torch.zeros_like(pre).scatter(1, top.indices.long(), values)
    want = torch.autograd.grad((dense @ W[1] - x).square().sum(), [*W, b])
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-3 * w.norm()
