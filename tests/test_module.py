"""An SAE as people use a module: sequences, dense activations, hooks, the error term, splicing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.interop import About
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import config_data, save_llama

D_IN, D_SAE, K = 16, 48, 4


@pytest.fixture
def sae() -> TopKSAE:
    made = TopKSAE(D_IN, D_SAE, K)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return made


def test_sequences_are_tokens_one_after_another(sae: TopKSAE) -> None:
    x = torch.randn(2, 5, D_IN)
    out, flat = sae(x), sae(x.flatten(0, 1))
    assert out.recon.shape == x.shape
    assert out.top_acts.shape == out.top_idx.shape == (2, 5, K)
    for a, b in zip(out, flat, strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    values, indices = sae.encode(x)
    assert torch.equal(sae.decode(values, indices), out.recon)
    one = sae(x[0, 0])
    torch.testing.assert_close(one.recon, out.recon[0, 0])
    assert one.top_idx.shape == (K,)
    with pytest.raises(ValueError, match="of another hookpoint"):
        sae(torch.randn(2, 5, D_IN + 1))


def test_dense_activations(sae: TopKSAE) -> None:
    x = torch.randn(2, 5, D_IN)
    acts = sae.encode_dense(x)
    assert acts.shape == (2, 5, D_SAE)
    assert ((acts > 0).sum(-1) <= K).all()
    torch.testing.assert_close(sae.decode_dense(acts), sae(x).recon)
    acts.sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_enc.grad.abs().sum() > 0


def test_cfg_tells_what_scripts_ask(sae: TopKSAE) -> None:
    cfg = sae.cfg
    assert (cfg.architecture, cfg.d_in, cfg.d_sae, cfg.k) == ("topk", D_IN, D_SAE, K)
    assert (cfg.dtype, cfg.device, cfg.hookpoint) == ("float32", "cpu", None)


def test_hooks_steer_and_ablate(sae: TopKSAE) -> None:
    x = torch.randn(3, D_IN)
    clean, acts = sae(x).recon, sae.encode_dense(x)
    latent = int(acts[0].argmax())
    seen = []

    def ablate(given: torch.Tensor) -> None:
        seen.append(given.clone())
        given[:, latent] = 0

    handle = sae.register_acts_hook(ablate)
    want = clean - acts[:, [latent]] * sae.W_dec[latent]
    torch.testing.assert_close(sae(x).recon, want)
    assert torch.equal(seen[0], acts)
    second = sae.register_acts_hook(lambda given: given + 2 * nn.functional.one_hot(
        torch.tensor(7), D_SAE))  # fmt: skip
    torch.testing.assert_close(sae(x).recon, want + 2 * sae.W_dec[7])
    handle.remove()
    second.remove()
    assert torch.equal(sae(x).recon, clean)


def test_the_error_term_leaves_only_the_hooks_change(sae: TopKSAE) -> None:
    x = torch.randn(3, D_IN)
    sae.use_error_term = True
    torch.testing.assert_close(sae(x).recon, x)
    with torch.no_grad():
        handle = sae.register_acts_hook(lambda acts: acts.index_fill(1, torch.tensor([3]), 5.0))
        was = sae.encode_dense(x)[:, [3]]
        torch.testing.assert_close(sae(x).recon, x + (5 - was) * sae.W_dec[3])
    handle.remove()


def test_spliced_into_a_model(sae: TopKSAE, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_llama(tmp_path)).eval()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        clean = model(ids).logits
        sae.use_error_term = True
        with sae.spliced(model, "model.layers.1"):
            torch.testing.assert_close(model(ids).logits, clean, rtol=1e-4, atol=1e-4)
        sae.use_error_term = False
        with sae.spliced(model, "model.layers.1"):
            changed = model(ids).logits
        assert (changed - clean).abs().max() > 1e-3
        # A block's output is what goes into the next one.
        with sae.spliced(model, "model.layers.2:input"):
            torch.testing.assert_close(model(ids).logits, changed)
        assert torch.equal(model(ids).logits, clean)
    with (
        pytest.raises(ValueError, match="no module 'model.layers.9'"),
        sae.spliced(model, "model.layers.9"),
    ):
        pass


def test_from_pretrained_takes_any_format(sae: TopKSAE, tmp_path: Path) -> None:
    interop.save(sae, tmp_path / "lens", "sae_lens", About("model.layers.3"))
    back = TopKSAE.from_pretrained(tmp_path, "lens")
    assert torch.equal(back.W_enc, sae.W_enc)
    assert back.cfg.hookpoint == "model.layers.3"
    back.save(tmp_path / "own")
    assert TopKSAE.load(tmp_path / "own").about.hookpoint == "model.layers.3"
    with pytest.raises(ValueError, match="is no file or folder, nor a repository's name"):
        TopKSAE.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="could not be downloaded"):
        TopKSAE.from_pretrained("nobody/nothing-of-this-name")


def test_layer_norm_standardises_and_puts_back(tmp_path: Path) -> None:
    plain = TopKSAE(D_IN, D_SAE, K)
    sae = TopKSAE(D_IN, D_SAE, K, input_norm="layer_norm")
    x = 3 * torch.randn(6, D_IN) + 5
    deviation, mean = x.std(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)
    rows = (x - mean) / (deviation + 1e-5)
    torch.testing.assert_close(sae(x).recon, plain(rows).recon * deviation + mean)
    torch.testing.assert_close(sae.encode_dense(x), plain.encode_dense(rows))
    torch.testing.assert_close(sae(7 * x).top_acts, sae(x).top_acts)
    sae.use_error_term = True
    torch.testing.assert_close(sae(x).recon, x, rtol=1e-3, atol=1e-3)
    sae.save(tmp_path)
    assert TopKSAE.load(tmp_path).config.input_norm == "layer_norm"
    data = config_data(tmp_path)
    data["sae"]["input_norm"], data["train"]["normalize"] = "layer_norm", "unit_mean_square"
    with pytest.raises(ValueError, match="drop one"):
        parse_config(data)
