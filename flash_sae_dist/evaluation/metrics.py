"""What an SAE does to stored activations: sums in float64 over a stream of batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from ..models.base import SparseCoder
from ..models.crosscoder import Crosscoder


class ReconstructionMetrics(NamedTuple):
    """Measured over `tokens` stored rows."""

    tokens: int
    fvu: float  # sum (x - recon)^2 / sum (x - mean x)^2; by sum x^2 where the rows are all alike
    mse: float  # mean over tokens of sum (x - recon)^2
    cosine: float  # mean over tokens of cos(x, recon)
    l2_ratio: float  # mean over tokens of |recon| / |x|, those of zeros left out
    relative_bias: float  # sum |recon|^2 / sum x . recon: below 1 where reconstructions are short
    l0: float  # mean active latents a token
    dead_fraction: float  # latents that never fired on these tokens, fewer than training counts
    density: Tensor  # [d_sae] float64, the fraction of tokens on which a latent fired
    source_fvus: tuple[float, ...] = ()  # of a crosscoder, that of each hookpoint's rows

    @property
    def explained_variance(self) -> float:
        """`1 - fvu`."""
        return 1 - self.fvu


@torch.no_grad()
def measure(
    sae: SparseCoder, batches: Iterable[Tensor] | Iterable[tuple[Tensor, ...]]
) -> ReconstructionMetrics:
    """Runs batches [N, d_in] through an SAE and measures it; a transcoder's are (input, target)
    rows, a crosscoder's those of each hookpoint. Its fvu weighs hookpoints as training did, each in
    units of its own; mse is of rows as they are. Raises ValueError where there are no batches.
    """
    device = sae.W_dec.device
    fired = torch.zeros(sae.d_sae, dtype=torch.int64, device=device)
    total = torch.zeros(sae.d_out, dtype=torch.float64, device=device)
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=device)
    columns = torch.zeros((2, sae.d_out), dtype=torch.float64, device=device)
    tokens = 0
    for batch in batches:
        x, target = _rows(sae, batch)
        out = sae(x)
        tokens += x.shape[0]
        recon, wide = out.recon.double(), target.double()
        total += wide.sum(dim=0)
        sums += _sums(wide, recon)
        if sae.sources:
            columns += torch.stack([(wide - recon).square().sum(dim=0), wide.square().sum(dim=0)])
        codes = out.codes
        fired.index_add_(0, codes.latents.flatten().long(), (codes.values > 0).flatten().long())
    if tokens == 0:
        raise ValueError("there are no activations to measure on; raise evaluate.num_tokens")
    squares, error, cosine, ratio, nonzero, recon_squares, product = sums
    fvu = _fvu(error, squares, total.square().sum() / tokens)
    source_fvus: tuple[float, ...] = ()
    if isinstance(sae, Crosscoder):
        fvu, source_fvus = _of_sources(sae, columns, total.square() / tokens)
    return ReconstructionMetrics(
        tokens,
        float(fvu),
        float(error / tokens),
        float(cosine / tokens),
        float(ratio / nonzero),
        float(recon_squares / product),
        float(fired.sum() / tokens),
        float((fired == 0).double().mean()),
        (fired.double() / tokens).cpu(),
        source_fvus,
    )


def _rows(sae: SparseCoder, batch: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """What an SAE reads and what it is to give."""
    device, parts = sae.W_dec.device, batch if isinstance(batch, tuple) else (batch,)
    if sae.sources:
        parts = (torch.cat(parts, dim=1),)
    x = parts[0].to(device, sae.W_dec.dtype)
    return x, parts[1].to(device) if len(parts) > 1 else x


def _fvu(error: Tensor, squares: Tensor, of_mean: Tensor) -> Tensor:
    # Rows are float32 at most: what is left of equal ones is float64's rounding of the sums.
    variance = squares - of_mean
    variance = torch.where(variance > 1e-12 * of_mean, variance, squares)
    return error / variance.clamp_min(torch.finfo(variance.dtype).tiny)


def _of_sources(
    sae: Crosscoder, columns: Tensor, of_mean: Tensor
) -> tuple[Tensor, tuple[float, ...]]:
    """FVU of all sources, each in the units that training gave it, and of each alone; from summed
    squares of errors and rows [2, D] and tokens times the squared mean [D].
    """
    widths = list(sae.sources)
    parts = zip(torch.split(columns, widths, dim=1), torch.split(of_mean, widths), strict=True)
    sums = torch.stack([torch.stack([*own.sum(dim=1), mean.sum()]) for own, mean in parts])
    each = [float(_fvu(*of)) for of in sums]
    return _fvu(*(sums / sae.source_scale.double().square()[:, None]).sum(dim=0)), tuple(each)


_SUMS = ("squares", "error", "cosine", "ratio", "nonzero", "recon_squares", "product")


def _sums(
    x: Tensor,  # [N, D] float64
    recon: Tensor,  # [N, D] float64
) -> Tensor:  # [len(_SUMS)] float64, over a batch
    norms, recon_norms = x.norm(dim=1), recon.norm(dim=1)
    parts = (
        norms.square().sum(),
        (x - recon).square().sum(),
        torch.cosine_similarity(x, recon, dim=1).sum(),
        torch.where(norms > 0, recon_norms / norms, 0).sum(),
        (norms > 0).sum().double(),
        recon_norms.square().sum(),
        (x * recon).sum(),
    )
    return torch.stack(parts)


class Histogram(NamedTuple):
    """How many latents fire how often."""

    log10_edges: list[float]  # one more than counts
    counts: list[int]
    never: int  # latents that did not fire at all


def density_histogram(density: Tensor, bins: int = 40) -> Histogram:
    """Counts latents by log10 of their firing frequency, over as many decades as they span."""
    logs = density[density > 0].log10()
    low = float(logs.min().floor()) if len(logs) else -1.0
    edges = torch.linspace(low, 0.0, bins + 1, dtype=torch.float64)
    counts = torch.histogram(logs.double(), edges).hist.long().tolist() if len(logs) else [0] * bins
    return Histogram(edges.tolist(), counts, int((density == 0).sum()))
