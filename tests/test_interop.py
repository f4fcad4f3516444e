"""Exports load in SAELens and sparsify, reconstruct the same, and theirs load here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flash_sae_dist import interop
from flash_sae_dist.interop import FORMATS, About, hook_names
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.topk import TopKSAE

HOOKPOINT = "model.layers.3"


@pytest.fixture
def sae() -> TopKSAE:
    torch.manual_seed(1)
    made = TopKSAE(12, 40, 5)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return made


@pytest.fixture
def x() -> torch.Tensor:
    return 2 * torch.randn(30, 12)


MODEL = "EleutherAI/pythia-70m"


@pytest.mark.slow
def test_sae_lens_reconstructs_the_same(sae: TopKSAE, x: torch.Tensor, tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    interop.save(sae, tmp_path, "sae_lens", About(HOOKPOINT, MODEL, 64))
    theirs = library.SAE.load_from_disk(str(tmp_path), device="cpu")
    out = sae(x)
    acts = theirs.encode(x)
    dense = torch.zeros_like(acts).scatter(1, out.codes.latents.long(), out.codes.values)
    torch.testing.assert_close(acts, dense, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), out.recon, rtol=1e-5, atol=1e-5)
    assert theirs.cfg.architecture() == "topk"
    assert theirs.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    assert theirs.cfg.metadata.model_name == MODEL
    assert theirs.cfg.metadata.model_class_name == "HookedTransformer"
    assert theirs.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": False}
    # ActivationsStore.from_sae refuses an SAE without these two.
    assert theirs.cfg.metadata.prepend_bos is True
    assert theirs.cfg.metadata.context_size == 64


@pytest.mark.slow
@pytest.mark.parametrize("d_out", [None, 7])
@pytest.mark.parametrize("name", sorted(FORMATS["sae_lens"].converters))
def test_sae_lens_takes_every_architecture(name: str, d_out: int | None, tmp_path: Path) -> None:
    library = pytest.importorskip("sae_lens")
    if d_out is not None and name not in FORMATS["sae_lens"].transcoders:
        pytest.skip("SAELens has no such transcoder")
    for skip in (False, *([True] if d_out else [])):
        kind = ARCHITECTURES[name]
        keys = {"architecture": name, "d_sae": 40, "k": 5, "skip": skip}
        fields = kind.Config.model_fields
        config = kind.Config.model_validate({n: v for n, v in keys.items() if n in fields})
        ours = kind.from_config(config, 12, **({"d_out": d_out} if d_out else {})).eval()
        with torch.no_grad():
            for tensor in ours.state_dict().values():
                tensor.add_(0.3 * torch.rand_like(tensor))
        about = About(HOOKPOINT, MODEL, 64, output_hookpoint=HOOKPOINT if d_out else None)
        interop.save(ours, tmp_path, "sae_lens", about)
        theirs, x = library.SAE.load_from_disk(str(tmp_path), device="cpu"), torch.randn(50, 12)
        torch.testing.assert_close(theirs.encode(x), ours.encode_dense(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs(x), ours(x).recon, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(interop.load(tmp_path)(x).recon, ours(x).recon)
        # What it writes itself is read back, too.
        theirs.save_model(str(tmp_path / "theirs"))
        back = interop.load(tmp_path / "theirs")
        torch.testing.assert_close(back(x).recon, ours(x).recon, rtol=1e-5, atol=1e-5)


_SPARSIFY = """
import sys, torch
from sparsify import SparseCoder
root, hookpoint = sys.argv[1:]
x = torch.load(root + "/x.pt", weights_only=True)
one = SparseCoder.load_from_disk(f"{root}/{hookpoint}", device="cpu")
many = SparseCoder.load_many(root, local=True, device="cpu")
outs = [m(x) for m in (one, many[hookpoint])]
outs = [(o.sae_out.float(), o.latent_acts.float(), o.latent_indices) for o in outs]
torch.save(outs, root + "/out.pt")
"""


@pytest.mark.slow
def test_sparsify_reconstructs_the_same(sae: TopKSAE, x: torch.Tensor, tmp_path: Path) -> None:
    pytest.importorskip("sparsify")
    interop.save(sae, tmp_path / HOOKPOINT, "sparsify")
    torch.save(x, tmp_path / "x.pt")
    # In a process of its own: with triton installed its decode needs Triton's interpreter on a CPU.
    env = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", _SPARSIFY, str(tmp_path), HOOKPOINT]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    ours = sae(x)
    for recon, acts, idx in torch.load(tmp_path / "out.pt", weights_only=True):
        torch.testing.assert_close(recon, ours.recon, rtol=1e-5, atol=1e-5)
        theirs = torch.zeros(len(x), sae.d_sae).scatter(1, idx.long(), acts)
        mine = torch.zeros(len(x), sae.d_sae).scatter(
            1, ours.codes.latents.long(), ours.codes.values
        )
        torch.testing.assert_close(theirs, mine, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_sae_lens_own_files_reconstruct_the_same(x: torch.Tensor, tmp_path: Path) -> None:
    """Those of its own training, with norms that the top k counts."""
    library = pytest.importorskip("sae_lens")
    config = library.TopKTrainingSAEConfig(d_in=12, d_sae=40, k=5)
    theirs = library.TopKTrainingSAE(config)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
    theirs.save_inference_model(str(tmp_path))
    saved = library.SAE.load_from_disk(str(tmp_path), device="cpu")
    assert saved.cfg.rescale_acts_by_decoder_norm, "its default"
    torch.testing.assert_close(interop.load(tmp_path)(x).recon, saved(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("hookpoint", "name"),
    [
        ("model.layers.8", "blocks.8.hook_resid_post"),
        ("transformer.h.3", "blocks.3.hook_resid_post"),
        ("transformer.h.3.attn", "blocks.3.hook_attn_out"),
        ("gpt_neox.layers.2.mlp", "blocks.2.hook_mlp_out"),
        ("gpt_neox.layers.2.attention", "blocks.2.hook_attn_out"),
        ("model.layers.5:input", "blocks.5.hook_resid_pre"),
        ("model.norm", "model.norm"),
        ("gpt_neox.layers.3.attention.dense:input", "blocks.3.attn.hook_z"),
        ("model.layers.0.self_attn.o_proj:input", "blocks.0.attn.hook_z"),
        ("transformer.h.1.mlp.c_proj:input", "blocks.1.mlp.hook_post"),
        ("model.layers.0.mlp:input", "model.layers.0.mlp:input"),
        # Here TransformerLens's hook of the same place sees another tensor, or may.
        ("model.layers.6.mlp", "model.layers.6.mlp"),
        ("model.layers.6.self_attn", "model.layers.6.self_attn"),
        ("transformer.h.3.mlp", "transformer.h.3.mlp"),
        ("bert.encoder.layer.3", "bert.encoder.layer.3"),
        ("vision_tower.encoder.layers.3", "vision_tower.encoder.layers.3"),
    ],
)
def test_hook_names(hookpoint: str, name: str) -> None:
    assert hook_names.hook_name(hookpoint) == name


KNOWN = frozenset({MODEL.lower()})


@pytest.mark.parametrize(
    ("model", "hookpoint", "hook", "words"),
    [
        (MODEL, "gpt_neox.layers.3", "blocks.3.hook_resid_post", ""),
        (None, "gpt_neox.layers.3", "blocks.3.hook_resid_post", ""),
        (MODEL, "gpt_neox.layers.3.mlp:input", "gpt_neox.layers.3.mlp:input", "no hook"),
        ("answerdotai/ModernBERT-base", "model.layers.3", "model.layers.3", "does not know"),
        ("mine", "model.layers.3:input", "model.layers.3:input", "no hook"),
    ],
)
def test_hooks_that_do_not_exist_are_told(
    sae: TopKSAE,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: str | None,
    hookpoint: str,
    hook: str,
    words: str,
) -> None:
    monkeypatch.setattr(hook_names, "_known_models", lambda: KNOWN)
    interop.save(sae, tmp_path, "sae_lens", About(hookpoint, model))
    told = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (told["hook_name"], told["hf_hook_name"]) == (hook, hookpoint)
    assert told["model_class_name"] == (
        "AutoModelForCausalLM" if hook == hookpoint else "HookedTransformer"
    )
    assert words in caplog.text
    assert bool(words) == bool(caplog.text)


def test_what_the_attention_hands_on_is_flattened(sae: TopKSAE, tmp_path: Path) -> None:
    interop.save(sae, tmp_path, "sae_lens", About("gpt_neox.layers.3.attention.dense:input"))
    config = json.loads((tmp_path / "cfg.json").read_text())
    assert config["reshape_activations"] == "hook_z"
    assert config["metadata"]["model_from_pretrained_kwargs"] == {
        "center_writing_weights": False,
        "fold_value_biases": False,
    }
    assert torch.equal(interop.load(tmp_path).W_enc, sae.W_enc)
