"""Where TransformerLens, and so SAELens, sees what a module of Hugging Face's gives."""

from __future__ import annotations

import importlib
import logging
import re
from functools import cache
from typing import Any

logger = logging.getLogger(__name__)
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


def layer_of(hookpoint: str | None) -> int | None:
    """The number in a hookpoint's name, which is its layer's."""
    found = re.search(r"\d+", hookpoint or "")
    return int(found[0]) if found else None


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


def hook_in(model_name: str | None, hookpoint: str) -> str:
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


def model_kwargs(hook: str) -> dict[str, Any]:
    """How SAELens is to load the model: centred weights would take the mean out of the residual
    stream, which SAEs have seen; folded biases of the values would be missing from hook_z.
    """
    kwargs = {"center_writing_weights": False}
    return kwargs | ({"fold_value_biases": False} if hook.endswith(".hook_z") else {})
