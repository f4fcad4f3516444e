"""TopKSAE is an ordinary module: any training loop works with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import flash_sae_dist
from flash_sae_dist import TopKSAE

D_IN, D_SAE, K = 10, 32, 4


class DenseSAE(nn.Module):
    """The same function written densely."""

    def __init__(self, sae: TopKSAE) -> None:
        super().__init__()
        for name, value in sae.state_dict().items():
            self.register_parameter(name, nn.Parameter(value.clone()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        acts = ((x - self.b_dec) @ self.W_enc.T + self.b_enc).relu()
        top = acts.topk(K, dim=1)
        sparse = torch.zeros_like(acts).scatter(1, top.indices, top.values)
        return sparse @ self.W_dec + self.b_dec


def test_exported_at_the_top() -> None:
    assert flash_sae_dist.TopKSAE is TopKSAE
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = flash_sae_dist.nothing_here  # type: ignore[attr-defined]


def test_a_plain_training_loop_equals_the_dense_one() -> None:
    sae = TopKSAE(D_IN, D_SAE, K, dtype=torch.float64)
    dense = DenseSAE(sae)
    x = torch.randn(64, D_IN, dtype=torch.float64)
    losses = []
    for model in (sae, dense):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        curve = []
        for _ in range(30):
            out = model(x)
            recon = out if isinstance(out, torch.Tensor) else out.recon
            loss = (recon - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_gradient_of_the_input() -> None:
    sae = TopKSAE(D_IN, D_SAE, K, dtype=torch.float64)
    x = torch.randn(5, D_IN, dtype=torch.float64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    sae(x).recon.square().sum().backward()
    DenseSAE(sae)(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_outputs_have_the_documented_shapes() -> None:
    out = TopKSAE(D_IN, D_SAE, K)(torch.randn(7, D_IN))
    assert out.recon.shape == (7, D_IN)
    assert out.codes.values.shape == out.codes.latents.shape == (7, K)
    assert out.codes.latents.dtype == torch.int32
    assert (out.codes.values >= 0).all()


def test_no_tokens_at_all() -> None:
    out = TopKSAE(D_IN, D_SAE, K)(torch.randn(0, D_IN))
    assert out.recon.shape == (0, D_IN)


def test_autocast_computes_in_bfloat16_and_selects_in_float32() -> None:
    sae, x = TopKSAE(D_IN, D_SAE, K), torch.randn(7, D_IN)
    exact = sae(x).recon
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = sae(x)
    assert out.codes.values.dtype == torch.float32
    error = (out.recon - exact).norm() / exact.norm()
    assert 0 < error < 2e-2
    out.recon.sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.dtype == torch.float32


def test_compiles_whole() -> None:
    sae, x = TopKSAE(D_IN, D_SAE, K), torch.randn(7, D_IN)
    compiled = torch.compile(sae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x).recon, sae(x).recon)
    compiled(x).recon.sum().backward()
    assert sae.b_dec.grad is not None


def test_state_dict_and_files(tmp_path: Path) -> None:
    sae = TopKSAE(D_IN, D_SAE, K)
    with torch.no_grad():
        sae.b_enc.normal_()
    other = TopKSAE(D_IN, D_SAE, K)
    other.load_state_dict(sae.state_dict())
    sae.save(tmp_path)
    back, x = TopKSAE.load(tmp_path), torch.randn(9, D_IN)
    for model in (other, back):
        assert torch.equal(model(x).recon, sae(x).recon)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no whole TopKSAE"):
        TopKSAE.load(tmp_path)


def test_decoder_rows_start_at_unit_norm_whatever_the_number_of_shards() -> None:
    torch.testing.assert_close(TopKSAE(D_IN, 200, K).W_dec.norm(dim=1), torch.ones(200))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [((10, 32, 0), "k=0"), ((10, 32, 33), "k=33")],
)
def test_bad_sizes_are_told(sizes: tuple[int, int, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TopKSAE(*sizes)


def test_bad_input_is_told() -> None:
    sae = TopKSAE(D_IN, D_SAE, K)
    with pytest.raises(ValueError, match=r"\[..., 10\], not \[3, 11\]"):
        sae(torch.randn(3, 11))
