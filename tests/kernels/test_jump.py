"""JumpReLU's kernels against the reference, which is held to autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flash_sae_dist.kernels import reference
from flash_sae_dist.models.sparsity import jump, step

pytest.importorskip("triton")
from flash_sae_dist.kernels import jump as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Pre-activations about thresholds of 0.1 to 0.6, 57 of 64 slots used, and a gradient."""
    gen = torch.Generator().manual_seed(0)
    pre = torch.rand(64, generator=gen, dtype=dtype)
    pre[57:] = 0
    latents = torch.randint(0, 5, (64,), generator=gen, dtype=torch.int32)
    threshold = torch.linspace(0.1, 0.6, 5, dtype=dtype)
    offsets, grad = torch.tensor([0, 20, 57], dtype=torch.int32), torch.randn(64, dtype=dtype)
    return tuple(t.to(DEVICE) for t in (pre, latents, threshold, offsets, grad))


@pytest.mark.parametrize("to_input", [False, True])
def test_gradients_are_those_of_autograd(to_input: bool) -> None:
    pre, latents, threshold, offsets, grad = case(torch.float64)
    leaf, own = (t.clone().requires_grad_() for t in (pre, threshold[latents.long()]))
    acts = jump(leaf, own, 0.2, to_input)
    loss = (acts * grad)[:57].sum() + 0.6 * step(leaf, own, 0.2, to_input)[:57].sum()
    want = torch.autograd.grad(loss, [leaf, own])
    cost = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    got = reference.jump_grads(pre, latents, threshold, offsets, grad, cost, 2.0, 0.2, to_input)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
    want_acts = acts.detach().clone()
    want_acts[57:] = 0
    assert torch.equal(reference.jump_acts(pre, latents, threshold, offsets), want_acts)


@pytest.mark.parametrize("to_input", [False, True])
def test_kernels_equal_the_reference(to_input: bool) -> None:
    pre, latents, threshold, offsets, grad = case(torch.float32)
    args = (pre, latents, threshold, offsets)
    assert torch.equal(kernels.jump_acts(*args), reference.jump_acts(*args))
    more = (grad, torch.tensor(0.3, device=DEVICE), 2.0, 0.2, to_input)
    got, want = kernels.jump_grads(*args, *more), reference.jump_grads(*args, *more)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours[57:].any()


def test_a_nan_stays_one() -> None:
    pre, latents, threshold, offsets, _ = case(torch.float32)
    pre[3] = torch.nan
    assert kernels.jump_acts(pre, latents, threshold, offsets).isnan().sum() == 1
