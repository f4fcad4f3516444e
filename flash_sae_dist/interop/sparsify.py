"""sparsify (EleutherAI): `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.about import About
from . import files
from .contents import (
    Contents,
    check_told,
    check_weights,
    named,
    transcoder_keys,
    whole_number,
)
from .format import Converters, Format, Written, converter

WEIGHTS_FILE, CONFIG_FILE = "sae.safetensors", "cfg.json"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_THEIRS = {ours: theirs for theirs, ours in _NAMES.items()}


def _topk_to(sae: Contents) -> Written:
    d_sae, d_in = sae.weights["W_enc"].shape
    if (d_out := len(sae.weights["b_dec"])) != d_in:
        raise ValueError(
            f"the transcoder is from width {d_in} to {d_out}, but sparsify's are of one width; "
            "name another format"
        )
    config = {
        "activation": "topk",
        "expansion_factor": max(1, d_sae // d_in),
        "normalize_decoder": not sae.transcodes,
        "num_latents": d_sae,
        "k": sae.keys["k"],
        "multi_topk": sae.architecture == "multi_topk",
        "skip_connection": "W_skip" in sae.weights,
        "transcode": sae.transcodes,
        "d_in": d_in,
    }
    weights = named(sae, *_NAMES.values())
    return {_THEIRS.get(ours, ours): tensor for ours, tensor in weights.items()}, config


def _topk_from(
    path: Path, found: dict[str, Any], config: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    skip = ("W_skip",) if config.get("skip_connection") else ()
    tensors = files.tensors(path / WEIGHTS_FILE, found, (*_NAMES, *skip))
    k = whole_number(path / CONFIG_FILE, "k", config.get("k"))
    weights = {_NAMES.get(name, name): t for name, t in tensors.items()}
    check_weights(path, weights, transcodes=bool(config.get("transcode")))
    return weights, {"k": k} | (transcoder_keys(weights) if config.get("transcode") else {})


# The same file but for a word on its training.
CONVERTERS: Converters = dict.fromkeys(("topk", "multi_topk"), (_topk_to, _topk_from))


def _architecture(config: dict[str, Any]) -> str:
    """Our name of what a cfg.json describes, or its own word."""
    name = str(config.get("activation", "topk"))
    if config.get("skip_connection", False) is not False and not config.get("transcode"):
        return "skip_connection"
    return "multi_topk" if name == "topk" and config.get("multi_topk") is True else name


def write(sae: Contents, folder: Path) -> None:
    """Writes an SAE so that sparsify's `SparseCoder.load_from_disk(folder)` gives the same
    reconstruction.

    With the folder named after the hookpoint, `SparseCoder.load_many(parent, local=True)` finds it
    too.
    """
    weights, config = CONVERTERS[sae.architecture][0](sae)
    files.begin(folder)
    files.write_safetensors(folder / WEIGHTS_FILE, weights)
    files.write_config(folder / CONFIG_FILE, config)
    files.seal(folder, [CONFIG_FILE, WEIGHTS_FILE])


def read(folder: Path, k: int | None = None) -> Contents:
    """Reads what `write` wrote, or sparsify. Raises ValueError for an architecture that is not
    read, or damage.
    """
    del k
    files.check(folder)
    config = files.read_config(folder / CONFIG_FILE)
    found = files.read_safetensors(folder / WEIGHTS_FILE)
    name = _architecture(config)
    weights, keys = converter(folder, CONVERTERS, name, name)(folder, found, config)
    # num_latents=0 leaves the width to expansion_factor.
    told = {"d_sae": config.get("num_latents") or None, "d_in": config.get("d_in")}
    check_told(folder, weights, transcodes="d_out" in keys, **told)
    # A folder is named after its hookpoint, `layers.3` say.
    hookpoint = folder.name if "." in folder.name else None
    return Contents(name, weights, keys, About(hookpoint=hookpoint))


FORMAT = Format(
    "sparsify",
    "sparsify",
    CONVERTERS,
    read,
    write,
    lambda names: {CONFIG_FILE, WEIGHTS_FILE} <= names,
    transcoders=frozenset(CONVERTERS),
)
