"""What `features` found in the files of other tools: batches as SAEDashboard writes them for
Neuronpedia, and the feature files that circuit-tracer's page reads.
"""

from __future__ import annotations

import gzip
import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from .folder import FeatureFolder

_LATENTS_A_BATCH = 128
_BINS = 40
# An interval of quantiles holds that share of a latent's activations.
_INTERVAL = 0.2
# Of a latent that was not looked at.
_NOTHING: dict[str, Any] = {
    "examples": [],
    "max": 0.0,
    "density": 0.0,
    "quantiles": {},
    "histogram": {"edges": [], "counts": []},
}


def neuronpedia_batches(
    found: FeatureFolder,
    target: Path,
    *,
    model_id: str,  # Neuronpedia's name of the model
    layer: int,
    sae_set: str,  # Neuronpedia's name of the SAEs, such as res-mine
    dataset: str = "",
) -> list[Path]:
    """Writes batch-0.json and so on into a new or empty folder; returns their paths."""
    _make_folder(target)
    about = {"model_id": model_id, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None}
    paths = []
    for number, latents in enumerate(_batched(found.latents(), _LATENTS_A_BATCH)):
        features = [_dashboard(latent) | {"dataset": dataset} for latent in latents]
        paths.append(target / f"batch-{number}.json")
        _write(paths[-1], json.dumps(about | {"features": features}, allow_nan=False).encode())
    return paths


def circuit_tracer_files(
    layers: Mapping[int, FeatureFolder],  # by the layer's number in circuit-tracer
    target: Path,
    transcoder_id: str = "",
) -> None:
    """Writes index.json.gz and layer_<n>.bin into a new or empty folder, which
    `circuit_tracer.frontend.local_server.serve` takes as features_dir. Latents that were not looked
    at have no examples there.
    """
    _make_folder(target)
    index: dict[str, Any] = {}
    for layer, found in layers.items():
        offsets, parts = [0], []
        d_sae, looked_at = found.summary()["spec"]["d_sae"], found.latents()
        latent = next(looked_at, None)
        for number in range(d_sae):
            page = _page(None, number, transcoder_id)
            if latent is not None and latent["index"] == number:
                page = _page(latent, number, transcoder_id)
                latent = next(looked_at, None)
            packed = zlib.compress(json.dumps(page, allow_nan=False).encode())
            parts += [struct.pack("<I", len(packed)), packed]
            offsets.append(offsets[-1] + 4 + len(packed))
        _write(target / f"layer_{layer}.bin", b"".join(parts))
        index[str(layer)] = {"filename": f"layer_{layer}.bin", "offsets": offsets}
    # Last: where it is, all is.
    _write(target / "index.json.gz", gzip.compress(json.dumps(index).encode(), mtime=0))


def _make_folder(target: Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    if any(target.iterdir()):
        raise ValueError(f"{target} is not empty; name a new folder")


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as partial:
        partial.write_bytes(data)


def _batched(latents: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for latent in latents:
        batch.append(latent)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _groups(latent: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for example in latent["examples"]:
        groups.setdefault(example["group"], []).append(example)
    return groups


def _values(example: dict[str, Any]) -> list[float]:
    """They have no word for a token whose activation was not stored."""
    return [float(value or 0) for value in example["values"]]


def _tokens(latent: dict[str, Any], name: str) -> tuple[list[str], list[float]]:
    ranked = latent.get(name, [])
    return [text for text, _, _ in ranked], [logit for _, _, logit in ranked]


def _heights(latent: dict[str, Any]) -> list[float]:
    """Activations in bins of one width from 0 to the largest; within a bin of the record their
    logarithms are taken to be spread evenly.
    """
    edges, counts = latent["histogram"]["edges"], latent["histogram"]["counts"]
    if not counts:
        return [0.0] * _BINS
    ends = np.append(np.linspace(0, latent["max"], _BINS + 1)[1:-1], max(edges[-1], latent["max"]))
    below = np.interp(np.log(ends), np.log(edges), np.concatenate([[0], np.cumsum(counts)]))
    return [round(height, 3) for height in np.diff(below, prepend=0).tolist()]


def _dashboard(latent: dict[str, Any]) -> dict[str, Any]:
    """A feature of a batch."""
    raised, raised_logits = _tokens(latent, "raised")
    lowered, lowered_logits = _tokens(latent, "lowered")
    width = latent["max"] / _BINS
    return {
        "feature_index": latent["index"],
        "frac_nonzero": latent["density"],
        "pos_str": raised,
        "pos_values": raised_logits,
        "neg_str": lowered,
        "neg_values": lowered_logits,
        "freq_hist_data_bar_values": [(at + 0.5) * width for at in range(_BINS)],
        "freq_hist_data_bar_heights": _heights(latent),
        "activations": [
            _activation(latent, group, examples, example)
            for group, examples in _groups(latent).items()
            for example in examples
        ],
    }


def _activation(
    latent: dict[str, Any],
    group: str,
    examples: list[dict[str, Any]],  # of the group
    example: dict[str, Any],
) -> dict[str, Any]:
    sizes = [float(other["value"]) for other in examples]
    # As SAEDashboard marks its group of the largest.
    bounds = (-1.0, latent["max"], -1.0)
    if group != "top":
        bounds = (min(sizes), max(sizes), _INTERVAL)
    return {
        "tokens": example["tokens"],
        "values": _values(example),
        "qualifying_token_index": example["at"],
        **dict(zip(("bin_min", "bin_max", "bin_contains"), bounds, strict=True)),
    }


def _page(latent: dict[str, Any] | None, number: int, transcoder_id: str) -> dict[str, Any]:
    """A latent as circuit-tracer's page reads it."""
    latent = latent or _NOTHING
    return {
        "transcoder_id": transcoder_id,
        "index": number,
        "examples_quantiles": [
            {
                "quantile_name": "Top Activations" if group == "top" else group,
                "examples": [
                    {
                        "tokens": example["tokens"],
                        "tokens_acts_list": _values(example),
                        "train_token_ind": example["at"],
                        "is_repeated_datapoint": False,
                    }
                    for example in examples
                ],
            }
            for group, examples in _groups(latent).items()
        ],
        "top_logits": _tokens(latent, "raised")[0],
        "bottom_logits": _tokens(latent, "lowered")[0],
        "act_min": 0.0,
        "act_max": latent["max"],
        "quantile_values": list(latent["quantiles"].values()),
        "histogram": _heights(latent),
        "activation_frequency": latent["density"],
    }
