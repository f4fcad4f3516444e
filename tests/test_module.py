"""An SAE as people use a module: sequences, dense activations, hooks, the error term, splicing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.interop import About
from flash_sae_dist.models import ARCHITECTURES
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
    assert out.codes.values.shape == out.codes.latents.shape == (2, 5, K)
    for a, b in zip((out.recon, *out.codes), (flat.recon, *flat.codes), strict=True):
        assert torch.equal(a.flatten(0, 1), b)
    assert torch.equal(sae.decode(sae.encode(x)), out.recon)
    one = sae(x[0, 0])
    torch.testing.assert_close(one.recon, out.recon[0, 0])
    assert one.codes.latents.shape == (K,)
    with pytest.raises(ValueError, match="of another hookpoint"):
        sae(torch.randn(2, 5, D_IN + 1))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_every_architecture_takes_sequences_and_hooks(name: str) -> None:
    kind = ARCHITECTURES[name].Config
    keys = {"architecture": name, "d_sae": D_SAE, "k": K}
    config = kind.model_validate({k: v for k, v in keys.items() if k in kind.model_fields})
    made = ARCHITECTURES[name].from_config(config, D_IN).eval()
    with torch.no_grad():
        for key, p in made.state_dict().items():
            if made.roles[key] == "rows":
                p.add_(0.2 * torch.rand_like(p))
    x = torch.randn(2, 5, D_IN)
    out, acts = made(x), made.encode_dense(x)
    assert acts.shape == (2, 5, D_SAE)
    assert 0 < (acts > 0).sum() < acts.numel()
    assert torch.equal(made(x.flatten(0, 1)).recon, out.recon.flatten(0, 1))
    torch.testing.assert_close(made.decode_dense(acts), out.recon)
    made.register_acts_hook(lambda given: given.index_fill(1, torch.tensor([3]), 0.0))
    want = out.recon - acts[..., [3]] * made.W_dec[3]
    torch.testing.assert_close(made(x).recon, want)


def test_a_transcoder_takes_sequences_and_hooks_alone() -> None:
    made = TopKSAE(D_IN, D_SAE, K, d_out=6, skip=True)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.2 * torch.randn_like(p))
    x = torch.randn(2, 5, D_IN)
    out = made(x).recon
    assert out.shape == (2, 5, 6)
    torch.testing.assert_close(made.decode_dense(made.encode_dense(x), x), out)
    made.register_acts_hook(lambda acts: acts * 0)
    torch.testing.assert_close(made(x).recon, made.b_dec + x @ made.W_skip.T)
    made.use_error_term = True
    with pytest.raises(ValueError, match="no error term"):
        made(x)
    with pytest.raises(ValueError, match="spliced is for SAEs"), made.spliced(nn.ReLU(), ""):
        pass
    with pytest.raises(ValueError, match="input_norm='layer_norm' is for SAEs"):
        TopKSAE(D_IN, D_SAE, K, d_out=6, input_norm="layer_norm")


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
    torch.testing.assert_close(sae(7 * x).codes.values, sae(x).codes.values)
    sae.use_error_term = True
    torch.testing.assert_close(sae(x).recon, x, rtol=1e-3, atol=1e-3)
    sae.save(tmp_path)
    assert TopKSAE.load(tmp_path).config.input_norm == "layer_norm"
    data = config_data(tmp_path)
    data["sae"]["input_norm"], data["train"]["normalize"] = "layer_norm", "unit_mean_square"
    with pytest.raises(ValueError, match="drop one"):
        parse_config(data)
