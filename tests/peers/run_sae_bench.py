"""SAEBench's core evaluation and sae-probes on an SAE of this library, offline: on a small random
model, and on a trained one, where DIR/model holds it in Hugging Face's form.

PYTHONPATH=. ENVIRONMENT/bin/python tests/peers/run_sae_bench.py DIR
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.core.main import run_evals
from sae_lens.training.activations_store import ActivationsStore
from sae_probes.generate_model_activations import ensure_dataset_activations
from sae_probes.run_sae_evals import run_sae_eval
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from flash_sae_dist import TopKSAE
from flash_sae_dist.compat.sae_bench import BenchSAE


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, in place of a download."""
    vocabulary = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<s>": len(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}
    folder = tempfile.mkdtemp()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    # TransformerLens opens it once more, by its path.
    return PreTrainedTokenizerFast.from_pretrained(folder)


def small_model() -> HookedTransformer:
    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=32, n_ctx=64, d_head=16, n_heads=2, d_mlp=64, d_vocab=257,
        act_fn="gelu", device="cpu", seed=0,
    )  # fmt: skip
    return HookedTransformer(cfg, tokenizer=bytes_tokenizer())


def packaged_model(folder: Path) -> HookedTransformer:
    """TransformerLens's form of a Llama, which it has by names of its hub alone."""
    llama = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    of = llama.config
    cfg = HookedTransformerConfig(
        n_layers=of.num_hidden_layers, d_model=of.hidden_size, n_ctx=128,
        d_head=of.hidden_size // of.num_attention_heads, n_heads=of.num_attention_heads,
        n_key_value_heads=of.num_key_value_heads, d_mlp=of.intermediate_size,
        d_vocab=of.vocab_size, act_fn="silu", normalization_type="RMS", eps=of.rms_norm_eps,
        positional_embedding_type="rotary", rotary_adjacent_pairs=False,
        rotary_dim=of.hidden_size // of.num_attention_heads,
        rotary_base=int(of.rope_parameters["rope_theta"]), final_rms=True, gated_mlp=True,
        device="cpu",
    )  # fmt: skip
    model = HookedTransformer(cfg, tokenizer=AutoTokenizer.from_pretrained(folder))
    model.load_and_process_state_dict(
        convert_llama_weights(llama, cfg), fold_ln=False, center_writing_weights=False,
        center_unembed=False, fold_value_biases=False,
    )  # fmt: skip
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids), llama(ids).logits, rtol=1e-3, atol=1e-3)
    return model


def sequences(model: HookedTransformer, length: int) -> Tensor:
    """Python's own manual pages as the model's tokens [S, length]; of bytes any."""
    if model.cfg.d_vocab == 257:
        return torch.randint(0, 256, (2000, length))
    pages = (inspect.getdoc(value) or "" for module in (os, str, dict, json, inspect, torch)
             for value in vars(module).values())  # fmt: skip
    ids = model.to_tokens("\n\n".join(pages), truncate=False)[0]
    return ids[: len(ids) // length * length].view(-1, length)


def trained(model: HookedTransformer, hook: str, ids: Tensor, steps: int) -> TopKSAE:
    """Least squares is enough: rows of the model as latents' directions."""
    from flash_sae_dist.compat.recipe import FusedTraining, Recipe

    sae = TopKSAE(model.cfg.d_model, 8 * model.cfg.d_model, 8)
    training = FusedTraining(sae, Recipe(2e-3, "fvu"), torch.float32)
    at = int(hook.split(".")[1]) + 1
    for step in range(steps):
        part = ids[torch.arange(16 * step, 16 * step + 16) % len(ids)]
        with torch.no_grad():
            _, cache = model.run_with_cache(part, names_filter=hook, stop_at_layer=at)
        # First tokens are so long that nothing else would be learnt from.
        x = cache[hook][:, 1:].flatten(0, 1)
        if step == 0:
            sae.b_dec.data.copy_(x.mean(0))
        training.step(x)
    return sae


def probe(wrapped: BenchSAE, model: HookedTransformer, out: Path) -> None:
    """sae-probes on one of its own data sets, which its package holds."""
    name, hook = "117_us_state_FL", wrapped.cfg.hook_name
    cache = out / "probes"
    ensure_dataset_activations(
        "small", [name], [hook], cache, device="cpu", max_seq_len=64, model=model
    )
    run_sae_eval(
        wrapped, name, hook, "l1", "normal", "small", cache, device="cpu", ks=[1, 16],
        results_path=out / "results",
    )  # fmt: skip
    (file,) = (out / "results").rglob("*.json")
    found = json.loads(file.read_text())
    print("sae-probes:", [(r["k"], round(r["test_auc"], 3)) for r in found])
    assert [r["k"] for r in found] == [1, 16]
    assert all(0 <= r["test_auc"] <= 1 for r in found)


def core(model: HookedTransformer, layer: int, steps: int) -> BenchSAE:
    """Trains an SAE, and compares what SAEBench's core evaluation says of it with what it is."""
    hook, ids = f"blocks.{layer}.hook_resid_post", sequences(model, 32)
    sae = trained(model, hook, ids, steps)
    wrapped = BenchSAE(sae, "small", layer)
    data = Dataset.from_dict({"tokens": ids.tolist()})
    store = ActivationsStore(
        model=model, dataset=data, streaming=False, hook_name=wrapped.cfg.hook_name,
        hook_head_index=None, context_size=32, d_in=sae.d_in, n_batches_in_buffer=16,
        total_training_tokens=10**9, store_batch_size_prompts=8, train_batch_size_tokens=256,
        prepend_bos=False, normalize_activations="none", device=torch.device("cpu"),
        dtype="float32",
    )  # fmt: skip
    cfg = CoreEvalConfig(
        batch_size_prompts=8, n_eval_reconstruction_batches=4, n_eval_sparsity_variance_batches=16,
        compute_kl=True, compute_ce_loss=True, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    metrics, _ = run_evals(wrapped, store, model, cfg)
    ids = torch.cat([store.get_batch_tokens(8) for _ in range(16)])
    with torch.no_grad():
        _, cache = model.run_with_cache(ids, prepend_bos=False, names_filter=hook)
        x = cache[hook].flatten(0, 1)
        recon = sae(x).recon
    # Its own is a token's squared error by the tokens of a batch.
    mse = float((x - recon).square().sum(dim=1).mean()) / (8 * 32)
    cosine = float(torch.cosine_similarity(x, recon, dim=1).mean())
    told = metrics["reconstruction_quality"]
    print(json.dumps(metrics, indent=1))
    print(f"SAEBench core: mse {told['mse']:.5f}, cosine {told['cossim']:.4f}; ours:")
    print(f"mse {mse:.5f}, cosine {cosine:.4f}")
    assert abs(told["mse"] / mse - 1) < 0.05
    assert abs(told["cossim"] - cosine) < 0.01
    assert abs(metrics["sparsity"]["l0"] - 8) < 0.1
    assert metrics["model_performance_preservation"]["ce_loss_score"] is not None
    return wrapped


def main() -> None:
    out = Path(sys.argv[1])
    model = small_model()
    probe(core(model, 1, 300), model, out)
    if (out / "model").is_dir():
        core(packaged_model(out / "model"), 8, 60)


if __name__ == "__main__":
    main()
