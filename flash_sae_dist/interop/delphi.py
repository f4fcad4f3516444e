"""delphi's latent cache: what latents do on a text, `<hookpoint>/{first}_{last}.safetensors`.

A file has the latents first .. last: `locations` [n, 3] (sequence, position, latent - first), their
`activations` [n], and all `tokens` [S, T]. It is made from an SAE's codes, without a dense pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..models.base import SparseCoder
from . import files

CONFIG_FILE = "config.json"
# What delphi itself leaves out.
_LEAST = 1e-5


class LatentCache(NamedTuple):
    """The activations of all latents on a text."""

    locations: Tensor  # [n, 3] int64: sequence, position, latent
    activations: Tensor  # [n] float16
    tokens: Tensor  # [S, T] int64


def _active(sae: SparseCoder, x: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Locations [n, 3] and activations [n] of sequences x [B, T, d_in], numbered from first."""
    codes = sae.encode(x)
    kept = codes.values > _LEAST
    latents = codes.latents[kept].long()
    if codes.tokens is None:
        sequences, positions = kept.nonzero()[:, :2].unbind(1)
    else:
        at, length = codes.tokens[kept].long(), x.shape[1]
        sequences, positions = at // length, at % length
    places = torch.stack([sequences + first, positions, latents], dim=1)
    return places.cpu(), codes.values[kept].half().cpu()


@torch.no_grad()
def write_cache(
    folder: str | Path,
    hookpoint: str,
    sae: SparseCoder,
    tokens: Tensor,  # [S, T] ids
    activations: Iterable[Tensor],  # [B, T, d_in], the model's, of the sequences one after another
    *,
    model_name: str,
    num_splits: int = 5,
    **config: Any,  # of delphi's CacheConfig: dataset_repo, dataset_split, ...
) -> Path:
    """Writes the cache of a hookpoint, which delphi's `LatentDataset(folder, ...)` reads; returns
    its folder. Raises ValueError where the activations are of another number of sequences.
    """
    found, values, first = [], [], 0
    for batch in activations:
        places, acts = _active(sae, batch.to(sae.W_dec), first)
        found.append(places)
        values.append(acts)
        first += len(batch)
    if first != len(tokens):
        raise ValueError(f"activations are of {first} sequences, tokens of {len(tokens)}")
    locations, kept_values = torch.cat(found), torch.cat(values)
    place = Path(folder) / hookpoint
    place.mkdir(parents=True, exist_ok=True)
    borders = torch.linspace(0, sae.d_sae, num_splits + 1).long().tolist()
    for start, stop in zip(borders, borders[1:], strict=False):
        own = (locations[:, 2] >= start) & (locations[:, 2] < stop)
        part = locations[own] - torch.tensor([0, 0, start])
        small = max(len(tokens), tokens.shape[1], stop - start) < 2**16
        split = {
            "locations": part.to(torch.uint16 if small else torch.uint32),
            "activations": kept_values[own],
            "tokens": tokens.cpu(),
        }
        files.write_safetensors(place / f"{start}_{stop - 1}.safetensors", split)
    context = {"ctx_len": tokens.shape[1], "n_tokens": tokens.numel(), "n_splits": num_splits}
    files.write_config(place / CONFIG_FILE, {**context, **config, "model_name": model_name})
    return place


def read_cache(place: str | Path) -> LatentCache:
    """The cache of a hookpoint's folder, by delphi or `write_cache`. Raises ValueError where it is
    none, or damaged.
    """
    named = [(re.fullmatch(r"(\d+)_(\d+)", p.stem), p) for p in Path(place).glob("*.safetensors")]
    splits = sorted((int(name[1]), path) for name, path in named if name)
    if not splits:
        raise ValueError(f"{place} holds no latent cache (FIRST_LAST.safetensors); check the path")
    locations, activations, tokens = [], [], torch.empty(0, 0, dtype=torch.int64)
    for start, path in splits:
        found = files.tensors(path, files.read_safetensors(path), ("locations", "activations"),
                              ("tokens",))  # fmt: skip
        rows = found["locations"].long()
        if rows.ndim != 2 or rows.shape[1] != 3 or len(rows) != len(found["activations"]):
            raise ValueError(f"{path}: locations are {list(rows.shape)}, not one of three numbers "
                             "for each activation; write it anew")  # fmt: skip
        locations.append(rows + torch.tensor([0, 0, start]))
        activations.append(found["activations"])
        tokens = found.get("tokens", tokens).long()
    return LatentCache(torch.cat(locations), torch.cat(activations), tokens)
