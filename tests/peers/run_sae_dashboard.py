"""SAEDashboard on exports of this library, offline, on a small model.

ENVIRONMENT/bin/python tests/peers/run_sae_dashboard.py DIR    (DIR/ours holds the exports)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens import HookedTransformerConfig
from transformers import PreTrainedTokenizerFast


def small_model() -> HookedSAETransformer:
    vocabulary = {c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = Tokenizer(models.BPE(vocabulary | {"<s>": len(vocabulary)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    folder = tempfile.mkdtemp()
    special = {"bos_token": "<s>", "eos_token": "<s>", "pad_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    cfg = HookedTransformerConfig(
        n_layers=2, d_model=12, n_ctx=64, d_head=6, n_heads=2, d_mlp=24, d_vocab=257,
        act_fn="gelu", device="cpu", seed=0,
    )  # fmt: skip
    return HookedSAETransformer(cfg, tokenizer=PreTrainedTokenizerFast.from_pretrained(folder))


def run(model: HookedSAETransformer, folder: Path) -> None:
    sae = SAE.load_from_disk(str(folder), device="cpu")
    if hasattr(sae, "fold_W_dec_norm"):
        # What its runner for Neuronpedia does first, and refuses where norms are not counted.
        sae.fold_W_dec_norm()
    torch.manual_seed(0)
    tokens = torch.randint(0, 256, (64, 32))
    cfg = SaeVisConfig(
        hook_point="blocks.0.hook_resid_post", features=list(range(6)), minibatch_size_features=4,
        minibatch_size_tokens=16, device="cpu",
    )  # fmt: skip
    data = SaeVisRunner(cfg).run(encoder=sae, model=model, tokens=tokens)
    found = data.feature_data_dict
    print(f"SAEDashboard: pages of {len(found)} latents of {folder.name}")
    assert sorted(found) == list(range(6))


def main() -> None:
    model = small_model()
    for folder in sorted((Path(sys.argv[1]) / "ours").iterdir()):
        run(model, folder)


if __name__ == "__main__":
    main()
