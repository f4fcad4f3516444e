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
    named,
    transcoder_keys,
    turned,
    unit_rows,
    whole_number,
    with_unit_rows,
)
from .format import Converters, Format, Written, converter
from .hook_names import hook_in, model_kwargs

WEIGHTS_FILE, CONFIG_FILE = "sae_weights.safetensors", "cfg.json"
# A file without a version is taken for one from before 6.0 and rewritten on load.
_VERSION = "6.54.12"
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")


def _to(sae: Contents, *names: str) -> dict[str, Tensor]:
    weights = named(sae, *_WEIGHTS, *names)
    return {**weights, "W_enc": weights["W_enc"].T}


def _topk_to(sae: Contents) -> Written:
    # True where it makes no difference: SAEDashboard and SAELens's folding want it so.
    rescales = unit_rows(sae.weights["W_dec"])
    own = {"architecture": "topk", "k": sae.keys["k"], "rescale_acts_by_decoder_norm": rescales}
    return _to(sae), own


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights = _our_weights(path, files.tensors(path / WEIGHTS_FILE, found, _WEIGHTS), config)
    k = whole_number(path / CONFIG_FILE, "k", config.get("k"))
    if config.get("rescale_acts_by_decoder_norm"):
        weights = with_unit_rows(weights)
    return weights, {"k": k}


def _jumprelu_to(sae: Contents) -> Written:
    return _to(sae, "threshold"), {"architecture": f"jumprelu{_transcoder(sae)}"}


def _jumprelu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _plain(path, found, config, (*_WEIGHTS, "threshold"))


def _relu_to(sae: Contents) -> Written:
    return _to(sae), {"architecture": _transcoder(sae).removeprefix("_") or "standard"}


def _relu_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return _plain(path, found, config, _WEIGHTS)


def _gated_to(sae: Contents) -> Written:
    weights = _to(sae, "r_mag", "b_mag")
    weights["b_gate"] = weights.pop("b_enc")
    return weights, {"architecture": "gated"}


def _gated_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    file = path / WEIGHTS_FILE
    weights = files.tensors(file, found, ("W_enc", "b_gate", "W_dec", "b_dec", "r_mag", "b_mag"))
    weights["b_enc"] = weights.pop("b_gate")
    if not config.get("apply_b_dec_to_input", True):
        raise ValueError(
            f"{path}: a gated SAE with apply_b_dec_to_input=False is not read here; fold it first"
        )
    return _our_weights(path, weights, config), {}


def _transcoder(sae: Contents) -> str:
    """The end of a transcoder's architecture in its words."""
    if not sae.transcodes:
        return ""
    return "_skip_transcoder" if "W_skip" in sae.weights else "_transcoder"


def _plain(
    path: Path, found: dict[str, Any], config: dict[str, Any], names: tuple[str, ...]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An SAE whose tensors have our names, or a transcoder."""
    theirs = str(config.get("architecture"))
    skip = ("W_skip",) if "skip_transcoder" in theirs else ()
    weights = files.tensors(path / WEIGHTS_FILE, found, (*names, *skip))
    if "transcoder" not in theirs:
        return _our_weights(path, weights, config), {}
    weights["W_enc"] = turned(weights["W_enc"])
    check_told(path, weights, transcodes=True, d_sae=None, d_in=None)
    if (told := config.get("d_out", len(weights["b_dec"]))) != len(weights["b_dec"]):
        raise ValueError(
            f"{path}: b_dec holds {len(weights['b_dec'])}, but its config says d_out={told!r}; the "
            "files are not of one transcoder, export it anew"
        )
    return weights, transcoder_keys(weights)


def _our_weights(path: Path, found: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """W_enc turned, b_enc that of an encoder which reads x - b_dec."""
    weights = {**found, "W_enc": turned(found["W_enc"])}
    check_weights(path, weights)
    if not config.get("apply_b_dec_to_input", True):
        weights["b_enc"] = centred(*(weights[n] for n in ("W_enc", "b_enc", "b_dec")))
    return weights


# SAELens itself writes what selects over a batch as jumprelu.
CONVERTERS: Converters = {
    "topk": (_topk_to, _topk_from),
    "multi_topk": (_topk_to, None),
    "batch_topk": (_jumprelu_to, None),
    "matryoshka": (_jumprelu_to, None),
    "jumprelu": (_jumprelu_to, _jumprelu_from),
    "gated": (_gated_to, _gated_from),
    "relu": (_relu_to, _relu_from),
}
TRANSCODERS = frozenset({"batch_topk", "matryoshka", "jumprelu", "relu"})
_OURS = {
    "standard": "relu",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}


def _metadata(about: About) -> tuple[str, dict[str, Any]]:
    """The hook that SAELens is to read, and how it is to load the language model."""
    hookpoint = about.hookpoint or "unknown"
    hook = hook_in(about.model_name, hookpoint)
    lens = hook != hookpoint
    output: dict[str, Any] = {}
    if about.output_hookpoint is not None:
        name = hook_in(about.model_name, about.output_hookpoint) if lens else about.output_hookpoint
        output = {"hook_name_out": name, "hf_hook_name_out": about.output_hookpoint}
    return hook, {
        **output,
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
    d_sae, d_in = sae.weights["W_enc"].shape
    config = {
        "d_in": d_in,
        "d_sae": d_sae,
        **own,
        "dtype": str(sae.weights["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": not sae.transcodes,
        **({"d_out": sae.keys["d_out"]} if sae.transcodes else {}),
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
        text("hf_hook_name_out") or (text("hook_name_out") if of_model else None),
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
    theirs = config.get("architecture")
    ours = _OURS.get(str(theirs), str(theirs))
    weights, keys = converter(folder, CONVERTERS, ours, theirs)(folder, found, config)
    if config.get("normalize_activations") == "layer_norm":
        keys["input_norm"] = "layer_norm"
    told = {"d_sae": config.get("d_sae"), "d_in": config.get("d_in")}
    check_told(folder, weights, transcodes="d_out" in keys, **told)
    return Contents(ours, weights, keys, _about(config["metadata"]))


FORMAT = Format(
    "sae_lens",
    "SAELens",
    CONVERTERS,
    read,
    write,
    lambda names: {CONFIG_FILE, WEIGHTS_FILE} <= names,
    layer_norm=True,
    transcoders=TRANSCODERS,
)
