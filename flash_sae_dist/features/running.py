"""What a pass keeps of each latent: the rows of its largest keys, and counts of its activations by
their size. All of it are tensors on the SAE's device that do not grow with the store.

Legend: L latents, M pairs, n rows kept a latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.initial import mix_
from .pairs import ActivePairs

# Bins an octave, and octaves below and above the hookpoint's root mean square.
_FINE, _BELOW, _ABOVE = 16, 16, 20
NUM_BINS = _FINE * (_BELOW + _ABOVE)
_EMPTY = -1


class TopRows:
    """The n rows with the largest keys of each latent, exactly; of equal keys the first rows."""

    def __init__(self, num_latents: int, count: int, device: torch.device) -> None:
        self.keys = torch.full((num_latents, count), _EMPTY, dtype=torch.int32, device=device)
        self.rows = torch.full((num_latents, count), -1, dtype=torch.int64, device=device)

    def add(self, pairs: ActivePairs, keys: Tensor) -> None:
        """Takes keys [M] int32 >= 0 of pairs of rows behind those that were added before."""
        count = self.keys.shape[1]
        if count == 0:
            return
        ahead = keys > self.keys[:, -1][pairs.latents]
        latents, rows, keys = pairs.latents[ahead], pairs.rows[ahead], keys[ahead]
        if not len(keys):
            return
        # By latent, then by falling key; a stable sort leaves equal keys in the order of rows.
        order = ((latents << 32) - keys.long()).argsort(stable=True)
        latents, rows, keys = latents[order], rows[order], keys[order]
        touched, group, sizes = torch.unique_consecutive(
            latents, return_inverse=True, return_counts=True
        )
        rank = torch.arange(len(latents), device=keys.device) - (sizes.cumsum(0) - sizes)[group]
        fits = rank < count
        group, rank = group[fits], rank[fits]
        shape = (len(touched), count)
        new_keys, new_rows = self.keys.new_full(shape, _EMPTY), self.rows.new_full(shape, -1)
        new_keys[group, rank], new_rows[group, rank] = keys[fits], rows[fits]
        both = torch.cat([self.keys[touched], new_keys], dim=1)
        best, place = both.sort(dim=1, descending=True, stable=True)
        both_rows = torch.cat([self.rows[touched], new_rows], dim=1)
        self.keys[touched] = best[:, :count]
        self.rows[touched] = both_rows.gather(1, place[:, :count])


def size_keys(pairs: ActivePairs) -> Tensor:
    """Keys [M] that order pairs by their activations: the bits of positive floats do."""
    return pairs.values.view(torch.int32)


def chance_keys(pairs: ActivePairs) -> Tensor:
    """Keys [M] of chance, a function of row and latent alone: the rows of the largest n are a
    sample in which all rows of a latent have the same chance.
    """
    return (mix_(mix_(pairs.rows.clone()) + pairs.latents) & 0x7FFFFFFF).int()


class ActivationCounts:
    """How often each latent was active, and how strongly: counts of 16 bins an octave, from 2**-16
    to 2**20 times the hookpoint's root mean square; what lies beyond is in the outermost bins.
    """

    def __init__(self, num_latents: int, unit: float, device: torch.device) -> None:
        """unit: the root mean square of the rows' elements."""
        self.unit = unit if unit > 0 else 1.0
        self.counts = torch.zeros(num_latents * NUM_BINS, dtype=torch.int32, device=device)
        self.sums = torch.zeros(num_latents, dtype=torch.float64, device=device)
        self.tokens = 0

    def add(self, pairs: ActivePairs, num_tokens: int) -> None:
        """Counts the pairs of so many rows."""
        bins = ((pairs.values / self.unit).log2_() + _BELOW) * _FINE
        place = pairs.latents * NUM_BINS + bins.long().clamp_(0, NUM_BINS - 1)
        self.counts.index_add_(0, place, torch.ones_like(place, dtype=torch.int32))
        self.sums.index_add_(0, pairs.latents, pairs.values.double())
        self.tokens += num_tokens

    def by_bin(self) -> Tensor:
        """Counts [L, NUM_BINS]."""
        return self.counts.view(-1, NUM_BINS)

    def fired(self) -> Tensor:
        """Rows on which each latent was active [L] int64."""
        return self.by_bin().sum(dim=1)

    def edges(self) -> Tensor:
        """The bins' edges [NUM_BINS + 1] float64."""
        octaves = torch.arange(NUM_BINS + 1, dtype=torch.float64) / _FINE - _BELOW
        return octaves.exp2() * self.unit

    def quantiles(self, shares: tuple[float, ...], some: slice = slice(None)) -> Tensor:
        """The activations [L, len(shares)] below which those shares of some latents' activations
        lie, to within a bin (4%): of what is in a bin, logarithms are taken to be spread evenly.
        NaN for latents that were never active.
        """
        counts = self.by_bin()[some].double()
        ends = counts.cumsum(dim=1)
        total = ends[:, -1:]
        wanted = torch.tensor(shares, dtype=torch.float64, device=counts.device) * total
        place = torch.searchsorted(ends, wanted).clamp_(max=NUM_BINS - 1)
        inside = counts.gather(1, place)
        before = ends.gather(1, place) - inside
        octaves = (place + (wanted - before) / inside) / _FINE - _BELOW
        return torch.where(total > 0, octaves.exp2() * self.unit, torch.nan)
