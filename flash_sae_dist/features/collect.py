"""The pass: a store's rows through an SAE, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..activations.sequential import row_blocks
from ..activations.store import ActivationStore
from ..config.base import sources_of
from ..config.run import FeaturesConfig
from ..models.base import SparseCoder
from .pairs import ActivePairs, PairSpool, active_pairs
from .running import ActivationCounts, TopRows, chance_keys, size_keys

QUANTILE_GROUPS = 5


class Collected(NamedTuple):
    """What a pass found of L latents."""

    latents: Tensor  # [L] int64, numbers in the SAE, ascending
    counts: ActivationCounts
    top: TopRows  # by activation
    sample: TopRows  # by chance


def start(latents: Tensor, cfg: FeaturesConfig, unit: float) -> Collected:
    """Nothing yet. unit: the root mean square of the rows' elements."""
    device, size = latents.device, len(latents)
    return Collected(
        latents,
        ActivationCounts(size, unit, device),
        TopRows(size, cfg.top_examples, device),
        TopRows(size, QUANTILE_GROUPS * cfg.quantile_examples, device),
    )


def add(found: Collected, pairs: ActivePairs, num_tokens: int) -> None:
    """Counts the pairs, whose latents are places in found.latents, of so many rows."""
    found.counts.add(pairs, num_tokens)
    found.top.add(pairs, size_keys(pairs))
    found.sample.add(pairs, chance_keys(pairs))


def chosen_pairs(pairs: ActivePairs, place: Tensor) -> ActivePairs:
    """The pairs of chosen latents, by their places [F] (-1: not chosen)."""
    pairs = pairs._replace(latents=place[pairs.latents])
    return pairs.at(pairs.latents >= 0)


@torch.no_grad()
def collect(
    sae: SparseCoder,
    store: ActivationStore,
    hookpoint: str,
    cfg: FeaturesConfig,
    spool: PairSpool,
    advance: Callable[[int], None] = lambda n: None,
) -> Collected:
    """Reads cfg.num_tokens rows, or all that there are, and puts their pairs into the spool."""
    device = sae.W_dec.device
    latents = _chosen(cfg.latents, sae.d_sae).to(device)
    place = torch.full((sae.d_sae,), -1, device=device)
    place[latents] = torch.arange(len(latents), device=device)
    stop = min(cfg.num_tokens, store.rows)
    lost = torch.from_numpy(store.left_out)
    names, size = sources_of(hookpoint), cfg.batch_tokens
    # A crosscoder's activations are of rows in units of their own.
    unit = (store.root_mean_square(hookpoint) if len(names) == 1 else 1.0) or 1.0
    found = start(latents, cfg, unit)
    blocks = [row_blocks(store, name, stop=stop, batch_tokens=size) for name in names]
    for parts in zip(*blocks, strict=True):
        first = parts[0].first
        x = torch.cat([part.rows for part in parts], dim=1).to(device, sae.W_dec.dtype)
        pairs = chosen_pairs(active_pairs(sae.encode(x), first), place)
        absent = lost[(lost >= first) & (lost < first + len(x))].to(device)
        if len(absent):
            pairs = pairs.at(~torch.isin(pairs.rows, absent))
        add(found, pairs, len(x) - len(absent))
        spool.add(pairs, first, len(x))
        advance(len(x))
    spool.close()
    return found


def _chosen(latents: Iterable[int] | None, d_sae: int) -> Tensor:
    if latents is None:
        return torch.arange(d_sae)
    return torch.tensor(sorted(set(latents)), dtype=torch.int64)
