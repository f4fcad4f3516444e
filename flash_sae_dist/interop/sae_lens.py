"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, W_enc turned to [d_in, d_sae]."""

from __future__ import annotations

import importlib
import logging
import re
from functools import cache
from pathlib import Path
from typing import Any

from ..models.topk import TopKSAE
from . import files

logger = logging.getLogger(__name__)
WEIGHTS_FILE = "sae_weights.safetensors"
# A file without a version is taken for one from before 6.0 and rewritten on load.
_VERSION = "6.54.12"
# Where a name alone tells that TransformerLens's hook sees the same tensor. Left out are
# `model.layers.N.mlp` and `.self_attn` (Gemma 2 and OLMo 2 normalise once more between the module
# and the hook), `transformer.h.N.mlp` (BLOOM's adds the residual) and BERT's layers (they end in a
# LayerNorm).
_BLOCK = r"(?:(?:model|transformer|gpt_neox)\.)?(?:layers|h)\.(\d+)"
_SAME = (
    (_BLOCK, "blocks.{}.hook_resid_post"),
    (rf"{_BLOCK}:input", "blocks.{}.hook_resid_pre"),
    (r"gpt_neox\.layers\.(\d+)\.mlp", "blocks.{}.hook_mlp_out"),
    (r"gpt_neox\.layers\.(\d+)\.attention", "blocks.{}.hook_attn_out"),
    (r"transformer\.h\.(\d+)\.attn", "blocks.{}.hook_attn_out"),
    # What the MLP's last product reads.
    (rf"{_BLOCK}\.mlp\.(?:down_proj|dense_4h_to_h|c_proj):input", "blocks.{}.mlp.hook_post"),
)
# What the attention's last product reads: TransformerLens has it by head, which SAELens flattens.
_BY_HEAD = rf"{_BLOCK}\.(?:self_attn\.o_proj|attention\.dense|attn\.c_proj):input"
_HOOK_Z = "blocks.{}.attn.hook_z"


def hook_name(hookpoint: str) -> str:
    """TransformerLens's name of a Hugging Face module where it sees the same tensor, else the
    module's own, as SAELens names hooks of its model class AutoModelForCausalLM.
    """
    for pattern, name in (*_SAME, (_BY_HEAD, _HOOK_Z)):
        if found := re.fullmatch(pattern, hookpoint):
            return name.format(found[1])
    return hookpoint


@cache
def _known_models() -> frozenset[str] | None:
    """Models that TransformerLens loads, in lower case; None where it is not installed."""
    try:
        lens: Any = importlib.import_module("transformer_lens.loading_from_pretrained")
    except ImportError:
        return None
    # Imported names, which a type checker takes for that module's own.
    official, aliases = (getattr(lens, kind) for kind in ("OFFICIAL_MODEL_NAMES", "MODEL_ALIASES"))
    return frozenset(
        name.lower() for name in [*official, *(a for of in aliases.values() for a in of)]
    )


def _hook_in(model_name: str | None, hookpoint: str) -> str:
    """The hook that SAELens is to read; a warning where its libraries have none."""
    name = hook_name(hookpoint)
    known = _known_models() if name != hookpoint and model_name is not None else None
    if known is not None and str(model_name).lower() not in known:
        logger.warning(
            "TransformerLens does not know %r: the export names the module %s itself, which "
            "SAELens reads from Hugging Face's model",
            model_name,
            hookpoint,
        )
        name = hookpoint
    if name == hookpoint and hookpoint.endswith(":input"):
        logger.warning(
            "SAELens has no hook for %s: it reads outputs of modules alone; give it these "
            "activations yourself",
            hookpoint,
        )
    return name


def _model_kwargs(hook: str) -> dict[str, Any]:
    """How SAELens is to load the model: centred weights would take the mean out of the residual
    stream, which SAEs have seen; folded biases of the values would be missing from hook_z.
    """
    kwargs = {"center_writing_weights": False}
    return kwargs | ({"fold_value_biases": False} if hook.endswith(".hook_z") else {})


def export(
    sae: TopKSAE,
    folder: str | Path,
    *,
    hookpoint: str,
    model_name: str | None = None,
    context_length: int | None = None,
    prepend_bos: bool = True,
) -> None:
    """Writes an SAE so that SAELens's `SAE.load_from_disk(folder)` reconstructs alike.

    The metadata says how SAELens is to load the language model, and whether sequences began with
    the begin token.
    """
    hook = _hook_in(model_name, hookpoint)
    lens = hook != hookpoint
    metadata: dict[str, Any] = {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": model_name,
        "hook_name": hook,
        "hf_hook_name": hookpoint,
        "hook_head_index": None,
        "context_size": context_length,
        "prepend_bos": prepend_bos,
        "model_class_name": "HookedTransformer" if lens else "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": _model_kwargs(hook) if lens else {},
        "trained_with": "flash_sae_dist",
    }
    config = {
        "architecture": "topk",
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "k": sae.k,
        "dtype": str(sae.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
        "reshape_activations": "hook_z" if hook.endswith(".hook_z") else "none",
        "metadata": metadata,
    }
    weights = {
        "W_enc": sae.W_enc.detach().T,
        "b_enc": sae.b_enc,
        "W_dec": sae.W_dec,
        "b_dec": sae.b_dec,
    }
    files.write(Path(folder), weights, WEIGHTS_FILE, config)


def load(folder: str | Path) -> TopKSAE:
    """Reads a TopK SAE in SAELens's form. Raises ValueError for any other architecture or a
    damaged file.
    """
    path = Path(folder)
    weights, config = files.read(path, WEIGHTS_FILE, {"W_enc", "b_enc", "W_dec", "b_dec"})
    needed = {
        "architecture": "topk",
        "apply_b_dec_to_input": True,
        "rescale_acts_by_decoder_norm": False,
        "normalize_activations": "none",
    }
    if config.get("reshape_activations", "none") not in ("none", "hook_z"):
        needed["reshape_activations"] = "none"
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{path}/cfg.json: {key}={config[key]!r}, but only {value!r} is read here"
            )
    weights["W_enc"] = weights["W_enc"].T.contiguous()
    told = config.get("d_sae"), config.get("d_in")
    return files.build(path, weights, config["k"], told_shape=told)
