"""The order of a list's pairs that the decoder's and the encoder's gradients share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

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


def test_a_decoder_hands_its_order_to_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but for the streams."""
    x, W, b = torch.randn(6, 8), torch.randn(20, 8, requires_grad=True), torch.zeros(20)
    names: list[str] = []
    compute = eager.compute

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return compute(name, *args)

    def gradient() -> torch.Tensor:
        top = ops.topk_encode(x, W, b, 3)
        recon = ops.sparse_decode(top.values, top.latents, W)
        del top
        (grad,) = torch.autograd.grad((recon - x).square().sum(), W)
        return grad

    want = gradient()
    made: list[torch.Tensor] = []

    def beside(top_idx: torch.Tensor, W_dec: torch.Tensor, _: None) -> tuple[Any, None]:
        made.append(top_idx)
        return reference.order_pairs(top_idx, W_dec.shape[0]), None

    monkeypatch.setattr(eager, "compute", counted)
    monkeypatch.setattr(eager, "use_kernels", lambda like: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(eager, "_order_beside", beside)
    torch.testing.assert_close(gradient(), want)
    assert len(made) == 1
    assert "order_pairs" not in names
    assert names.count("scatter_rows") >= 1


def test_a_compiler_makes_one_order_for_both_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the two gradients ask for it each."""
    x, b = torch.randn(6, 8), torch.zeros(20)
    W = [torch.randn(20, 8, requires_grad=True) for _ in range(2)]
    names: list[str] = []
    compute = ops.compute

    def counted(name: str, *args: Any) -> Any:
        names.append(name)
        return compute(name, *args)

    def loss(x: torch.Tensor, *W: torch.Tensor) -> torch.Tensor:
        top = ops.topk_encode(x, W[0], b, 3)
        return (ops.sparse_decode(top.values, top.latents, W[1]) - x).square().sum()

    want = torch.autograd.grad(loss(x, *W), W)
    monkeypatch.setattr(ops, "compute", counted)
    monkeypatch.setattr(ops, "use_kernels", lambda like: True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager_decomp_partition")
    got = torch.autograd.grad(compiled(x, *W), W)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert names.count("order_pairs") == 1
    assert {"gathered_dots", "scatter_rows"} <= set(names)


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
        loss = (ops.sparse_decode(top.values, top.latents, W[1]) - x).square().sum()
        got = torch.autograd.grad(loss, [*W, b])
        assert names.count("order_pairs") == 1
    pre = x @ W[0].T + b
    values = pre.gather(1, top.latents.long()).relu()
    dense = torch.zeros_like(pre).scatter(1, top.latents.long(), values)
    want = torch.autograd.grad((dense @ W[1] - x).square().sum(), [*W, b])
    for g, w in zip(got, want, strict=True):
        assert (g - w).norm() <= 1e-3 * w.norm()


@pytest.mark.gpu
def test_compiled_gradients_equal_eager_ones() -> None:
    """By inductor, which lays memory out itself; the decoder's weights transposed, too."""
    x = torch.randn(300, 264, device="cuda").bfloat16()
    W_enc = torch.randn(5000, 264, device="cuda").bfloat16().requires_grad_()
    W_dec = torch.randn(264, 5000, device="cuda").bfloat16().requires_grad_()
    b = torch.zeros(5000, device="cuda", requires_grad=True)

    def loss(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        W_enc, W_dec, b = weights
        top = ops.topk_encode(x, W_enc, b, 16)
        return (ops.sparse_decode(top.values, top.latents, W_dec.t()) - x).float().square().sum()

    weights = (W_enc, W_dec, b)
    want = torch.autograd.grad(loss(x, *weights), weights)
    compiled = torch.compile(loss, fullgraph=True)
    got = torch.autograd.grad(compiled(x, *weights), weights)
    for g, w in zip(got, want, strict=True):
        assert (g.float() - w.float()).norm() <= 1e-2 * w.float().norm()


def test_lists_can_be_saved_and_checkpointed(tmp_path: Path) -> None:
    x, W = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    b = torch.zeros(20)

    def loss(x: torch.Tensor) -> torch.Tensor:
        top = ops.topk_encode(x, W, b, 3)
        return ops.sparse_decode(top.values, top.latents, W).square().sum()

    (want,) = torch.autograd.grad(loss(x), x)
    (got,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(got, want)
    indices = ops.topk_encode(x, W, b, 3).latents
    torch.save(indices, tmp_path / "i.pt")
    assert torch.equal(torch.load(tmp_path / "i.pt", weights_only=True), indices)
