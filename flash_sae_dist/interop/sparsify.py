"""sparsify (EleutherAI): `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..models.topk import TopKSAE
from . import files

WEIGHTS_FILE = "sae.safetensors"
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}


def export(sae: TopKSAE, folder: str | Path) -> None:
    """Writes an SAE so that sparsify's `SparseCoder.load_from_disk(folder)` gives the same
    reconstruction.

    With the folder named after the hookpoint, `SparseCoder.load_many(parent, local=True)` finds it
    too.
    """
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.d_sae // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.d_sae,
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
    }
    parameters = dict(sae.named_parameters())
    weights: dict[str, Tensor] = {theirs: parameters[ours] for theirs, ours in _NAMES.items()}
    files.write(Path(folder), weights, WEIGHTS_FILE, config)


def load(folder: str | Path) -> TopKSAE:
    """Reads a TopK SAE in sparsify's form. Raises ValueError for a transcoder, another activation
    or damage.
    """
    path = Path(folder)
    weights, config = files.read(path, WEIGHTS_FILE, set(_NAMES))
    for key, value in {"activation": "topk", "transcode": False, "skip_connection": False}.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{path}/cfg.json: {key}={config[key]!r}, but only {value!r} is read here"
            )
    # num_latents=0 leaves the width to expansion_factor.
    told = config.get("num_latents") or None, config.get("d_in")
    ours = {_NAMES[name]: t for name, t in weights.items()}
    return files.build(path, ours, config["k"], told_shape=told)
