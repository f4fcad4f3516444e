"""SAEBench's core evaluation and sae-probes on an SAE of this library, offline, on a small model.

PYTHONPATH=. ENVIRONMENT/bin/python tests/peers/sae_bench.py DIR
"""

from __future__ import annotations

import json
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
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformers import PreTrainedTokenizerFast

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


def trained(model: HookedTransformer) -> TopKSAE:
    """Least squares is enough: rows of the model as latents' directions."""
    from flash_sae_dist.compat.recipe import FusedTraining, Recipe

    sae = TopKSAE(32, 256, 8)
    training = FusedTraining(sae, Recipe(2e-3, "fvu"), torch.float32)
    for _ in range(300):
        ids = torch.randint(0, 256, (16, 32))
        _, cache = model.run_with_cache(ids, names_filter="blocks.1.hook_resid_post")
        training.step(cache["blocks.1.hook_resid_post"].flatten(0, 1).detach())
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


def main() -> None:
    out = Path(sys.argv[1])
    model = small_model()
    sae = trained(model)
    wrapped = BenchSAE(sae, "small", 1)
    data = Dataset.from_dict({"tokens": torch.randint(0, 256, (2000, 32)).tolist()})
    store = ActivationsStore(
        model=model, dataset=data, streaming=False, hook_name=wrapped.cfg.hook_name,
        hook_head_index=None, context_size=32, d_in=32, n_batches_in_buffer=16,
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
    _, cache = model.run_with_cache(ids, prepend_bos=False)
    x = cache["blocks.1.hook_resid_post"].flatten(0, 1)
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
    probe(wrapped, model, out)
    (out / "sae_bench.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main()
