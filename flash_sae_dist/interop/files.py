"""What the formats share: weights and json written under temporary names, read with every check.

Their checksums are in a file of their own, which the other libraries pass over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import tensor_files
from ..files import check_checksums, replacing, write_checksums, write_text
from ..models.topk import TopKSAE


def write(
    folder: Path, weights: dict[str, Tensor], weights_file: str, config: dict[str, Any]
) -> None:
    """Writes weights and cfg.json, each renamed into place, and their checksums."""
    with replacing(folder / weights_file) as partial:
        tensor_files.save(partial, weights)
    write_text(folder / "cfg.json", json.dumps(config, indent=2) + "\n")
    write_checksums(folder, ["cfg.json", weights_file])


def read(
    folder: Path, weights_file: str, keys: set[str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads weights and cfg.json, checksums compared where there are some. Raises ValueError where
    a file is damaged, or the tensors are others than keys, or cfg.json has no whole k.
    """
    try:
        check_checksums(folder)
        config: dict[str, Any] = json.loads((folder / "cfg.json").read_text())
        weights = load_file(folder / weights_file)
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"{folder} holds no whole SAE ({e}); download or export it anew") from e
    if set(weights) != keys:
        raise ValueError(
            f"{folder / weights_file} has tensors {sorted(weights)}, not {sorted(keys)}; "
            "it is no plain TopK SAE"
        )
    if not isinstance(config, dict) or type(config.get("k")) is not int:
        raise ValueError(f"{folder}/cfg.json has no k; it is no TopK SAE")
    return weights, config


def build(
    folder: Path, weights: dict[str, Tensor], k: int, *, told_shape: tuple[object, object]
) -> TopKSAE:
    """An SAE from tensors under our names.

    Raises ValueError where their shapes do not fit together, or where W_dec is not of told_shape,
    the (d_sae, d_in) of cfg.json (None where that does not tell).
    """
    shape = tuple(weights["W_dec"].shape)
    if len(shape) != 2 or any(
        told not in (None, is_) for told, is_ in zip(told_shape, shape, strict=True)
    ):
        raise ValueError(
            f"{folder}: W_dec is {list(shape)}, but cfg.json says {list(told_shape)}; "
            "the files are not of one SAE, export it anew"
        )
    d_sae, d_in = shape
    sae = TopKSAE(d_in, d_sae, k, dtype=weights["W_dec"].dtype, seed=None)
    try:
        sae.load_state_dict(weights)
    except RuntimeError as e:
        raise ValueError(
            f"{folder}: tensors do not fit together: {' '.join(str(e).split())}"
        ) from e
    return sae
