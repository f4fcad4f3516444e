"""SAELens 6: `cfg.json` and `sae_weights.safetensors`, W_enc turned to [d_in, d_sae]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.about import About
from . import files
from .contents import (
    Contents,
    centred,
    check_told,
    check_weights,
    turned,
    unit_rows,
    whole_number,
    with_unit_rows,
)
from .format import Format, Written, converter
from .hook_names import hook_in, model_kwargs

WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
# A file without a version is taken for one from before 6.0 and rewritten on load.
_VERSION = "6.54.12"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def _turned(sae: Contents) -> dict[str, Tensor]:
    return {**sae.weights, "W_enc": sae.weights["W_enc"].T}


def _topk_to(sae: Contents) -> Written:
    # True where it makes no difference: SAEDashboard and SAELens's folding want it so.
    rescales = unit_rows(sae.weights["W_dec"])
    return _turned(sae), {"k": sae.keys["k"], "rescale_acts_by_decoder_norm": rescales}


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = _our_weights(path, files.tensors(path / WEIGHTS_FILE, found, _WEIGHTS), config)
    k = whole_number(path / CONFIG_FILE, "k", config.get("k"))
    if config.get("rescale_acts_by_decoder_norm"):
        weights = with_unit_rows(weights)
    return weights, {"k": k}


def _jumprelu_to(sae: Contents) -> Written:
    return _turned(sae), {}


def _jumprelu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    needed = (*_WEIGHTS, "threshold")
    return _our_weights(path, files.tensors(path / WEIGHTS_FILE, found, needed), config), {}


def _our_weights(path: Path, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """W_enc turned, b_enc that of an encoder which reads x - b_dec."""
    weights = {**found, "W_enc": turned(found["W_enc"])}
    check_weights(path, weights)
    if not config.get("apply_b_dec_to_input", True):
        weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights


CONVERTERS = {
    "topk": (_topk_to, _topk_from),
    "jumprelu": (_jumprelu_to, _jumprelu_from),
}


def _metadata(about: About) -> tuple[str, dict[str, Any]]:
    """The hook that SAELens is to read, and how it is to load the language model."""
    hookpoint = about.hookpoint or "unknown"
    hook = hook_in(about.model_name, hookpoint)
    lens = hook != hookpoint
    return hook, {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        "model_name": about.model_name,
        "hook_name": hook,
        "hf_hook_name": hookpoint,
        "hook_head_index": None,
        "context_size": about.context_length,
        "prepend_bos": about.prepend_bos,
        "model_class_name": "HookedTransformer" if lens else "AutoModelForCausalLM",
        "model_from_pretrained_kwargs": model_kwargs(hook) if lens else {},
        "trained_with": "flash_sae_dist",
    }


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE so that SAELens's `SAE.load_from_disk(folder)` reconstructs alike.

    The metadata says how SAELens is to load the language model, and whether sequences began with
    the begin token.
    """
    weights, own = CONVERTERS[sae.architecture][0](sae)
    hook, metadata = _metadata(sae.about)
    d_sae, d_in = sae.weights["W_dec"].shape
    config = {
        "architecture": sae.architecture,
        "d_in": d_in,
        "d_sae": d_sae,
        **own,
        "dtype": str(sae.weights["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": sae.keys.get("input_norm", "none"),
        "reshape_activations": "hook_z" if hook.endswith(".hook_z") else "none",
        "metadata": metadata,
    }
    files.begin(folder)
    files.write_safetensors(folder / WEIGHTS_FILE, weights)
    files.write_config(folder / CONFIG_FILE, config)
    files.seal(folder, [CONFIG_FILE, WEIGHTS_FILE])


def _of_6(config: dict[str, Any]) -> dict[str, Any]:
    """The config of a file from before 6.0 in the words of today, as SAELens takes it."""
    metadata = config.get("metadata")
    if isinstance(metadata, dict):
        return config
    found = {**config, "metadata": {k: config[k] for k in _METADATA if k in config}}
    activation = config.get("activation_fn", config.get("activation_fn_str"))
    kwargs = config.get("activation_fn_kwargs")
    if activation == "topk" and isinstance(kwargs, dict):
        found |= {"architecture": "topk", "k": kwargs.get("k", config.get("k"))}
    found.setdefault("architecture", "standard")
    if found.get("normalize_activations") in (None, False):
        found["normalize_activations"] = "none"
    return found


_METADATA = ("model_name", "hook_name", "context_size", "prepend_bos")


def _about(metadata: dict[str, Any]) -> About:
    def text(key: str) -> str | None:
        value = metadata.get(key)
        return value if isinstance(value, str) and value != "unknown" else None

    of_model = metadata.get("model_class_name") == "AutoModelForCausalLM"
    hookpoint = text("hf_hook_name") or (text("hook_name") if of_model else None)
    context = metadata.get("context_size")
    return About(
        hookpoint,
        text("model_name"),
        context if type(context) is int else None,
        metadata.get("prepend_bos") is not False,
        text("hf_hook_name_out"),
    )


def read(folder: Path, k: int | None = None) -> Contents:
    """Reads what `write` wrote, or SAELens. Raises ValueError for an architecture that is not read,
    or damage.
    """
    del k
    files.check(folder)
    file = folder / CONFIG_FILE
    config = _of_6(files.read_config(file))
    allowed = {
        "apply_b_dec_to_input": (True, False),
        "rescale_acts_by_decoder_norm": (False, True),
        "normalize_activations": ("none", None, "layer_norm"),
        "reshape_activations": ("none", "hook_z"),
        "finetuning_scaling_factor": (False, None),
    }
    files.check_keys(file, config, allowed)
    found = files.read_safetensors(folder / WEIGHTS_FILE)
    # The only name of theirs for one of ours that is another's.
    theirs = config.get("architecture")
    ours = {"standard": "relu"}.get(str(theirs), str(theirs))
    weights, keys = converter(folder, CONVERTERS, ours, theirs)(folder, found, config)
    if config.get("normalize_activations") == "layer_norm":
        keys["input_norm"] = "layer_norm"
    check_told(folder, weights, d_sae=config.get("d_sae"), d_in=config.get("d_in"))
    return Contents(ours, weights, keys, _about(config["metadata"]))


FORMAT = Format(
    "sae_lens",
    "SAELens",
    CONVERTERS,
    read,
    write,
    lambda names: {CONFIG_FILE, WEIGHTS_FILE} <= names,
    layer_norm=True,
)
