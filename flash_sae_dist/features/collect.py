"""The pass: a store's rows through an SAE, once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..activations.order import Ints
from ..activations.passes import to_device
from ..activations.sequential import batches_in_order
from ..activations.store import ActivationStore
from ..config.base import sources_of
from ..config.run import FeaturesConfig
from ..models.base import Codes, SparseCoder
from .lines import QUANTILE_GROUPS
from .pairs import ActivePairs, PairSpool, active_pairs
from .running import ActivationCounts, TopRows, chance_keys, size_keys

# Slots of codes that are looked at together: on a GPU the host waits for it a dozen times for each.
_PAIRS_AT_ONCE = 1 << 20


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
    device, names = sae.W_dec.device, sources_of(hookpoint)
    stop = min(cfg.num_tokens, store.rows)
    # A crosscoder's activations are of rows in units of their own.
    unit = (store.root_mean_square(hookpoint) if len(names) == 1 else 1.0) or 1.0
    found = start(_chosen(cfg.latents, sae.d_sae).to(device), cfg, unit)
    place = None if cfg.latents is None else _places(found.latents, sae.d_sae)
    waiting: list[tuple[Codes, Ints]] = []
    first = 0

    def flush(stop_row: int) -> None:
        if not waiting:
            return
        numbers = np.concatenate([numbers for _, numbers in waiting])
        pairs = active_pairs([codes for codes, _ in waiting], to_device(numbers, device))
        waiting.clear()
        if place is not None:
            pairs = pairs._replace(latents=place[pairs.latents])
            pairs = pairs.at(pairs.latents >= 0)
        add(found, pairs, len(numbers))
        spool.add(pairs, first, stop_row)

    size = cfg.batch_tokens
    for batch in batches_in_order(store, names, stop=stop, batch_tokens=size, device=device):
        if sum(codes.values.numel() for codes, _ in waiting) >= _PAIRS_AT_ONCE:
            flush(int(batch.numbers[0]))
            first = int(batch.numbers[0])
        x = batch.rows[0] if len(names) == 1 else torch.cat(batch.rows, dim=1)
        waiting.append((sae.encode(x.to(sae.W_dec.dtype)), batch.numbers))
        advance(len(x))
    flush(stop)
    spool.close()
    return found


def _places(latents: Tensor, d_sae: int) -> Tensor:
    """The place [F] of each latent among those that were chosen; -1 for the others."""
    place = torch.full((d_sae,), -1, device=latents.device)
    place[latents] = torch.arange(len(latents), device=latents.device)
    return place


def _chosen(latents: Iterable[int] | None, d_sae: int) -> Tensor:
    if latents is None:
        return torch.arange(d_sae)
    return torch.tensor(sorted(set(latents)), dtype=torch.int64)
