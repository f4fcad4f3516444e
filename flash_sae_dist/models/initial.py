"""Initial weights: rows of unit norm, each element a pure function of (seed, latent, column).

A counter-based generator: a 64-bit hash of the counters gives two uniform numbers, and Box-Muller
two normal ones. No state is advanced, so any block of rows can be drawn alone, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_BITS = 64
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
# Elements drawn at a time: all that is made of them beside stays in a CPU's cache, or is large
# enough for a GPU.
_BLOCK = {"cpu": 1 << 16, "cuda": 1 << 22}


def _signed(word: int) -> int:
    """64 bits as torch.int64 has them."""
    word &= (1 << _BITS) - 1
    return word - (1 << _BITS) if word >> (_BITS - 1) else word


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own keeps the sign."""
    return (words >> by).bitwise_and_((1 << (_BITS - by)) - 1)


def mix_(words: Tensor) -> Tensor:
    """Hashes int64 words in place, one to one, and returns them: the finaliser of SplitMix64
    (Steele, Lea and Flood 2014, variant 13 of Stafford's).
    """
    for by, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        words.bitwise_xor_(_shifted(words, by)).mul_(_signed(multiplier))
    return words.bitwise_xor_(_shifted(words, 31))


def _keys(seed: int, stream: int, first: int, count: int, device: torch.device) -> Tensor:
    """Hashes of (seed, stream, first ..) [count]."""
    word = torch.tensor([seed + _signed(_GOLDEN)], device="cpu")
    key = int(mix_(mix_(word).add_(stream)))
    counters = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    return mix_(counters.mul_(_signed(_GOLDEN)).add_(key))


def normal_rows(seed: int, first: int, count: int, d_in: int, device: torch.device) -> Tensor:
    """Standard normal rows of latents first .. first + count, [count, d_in] float64.

    The same on every device up to the last bits of its log, cos and sin.
    """
    pairs = (d_in + 1) // 2
    rows = _keys(seed, 0, first, count, device)
    columns = _keys(seed, 1, 0, pairs, device)
    words = mix_(rows[:, None] + columns)
    # 32 bits each: the first in (0, 1), so that its logarithm is finite.
    radius = _shifted(words, 32).double().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_(0xFFFFFFFF).double().mul_(2 * math.pi * 2.0**-32)
    drawn = words.new_empty((count, 2 * pairs), dtype=torch.float64)
    torch.mul(radius, angle.cos(), out=drawn[:, :pairs])
    torch.mul(radius, angle.sin_(), out=drawn[:, pairs:])
    return drawn[:, :d_in]


@torch.no_grad()
def unit_rows_(out: Tensor, seed: int, first_latent: int) -> None:
    """Fills out [F, d_in] with random rows of unit norm, those of latents first_latent onwards.

    Drawn in float64 and rounded once: to the same float32 on every device and for every split of
    the rows, but for about one element in 10^8 whose last bit may differ.
    """
    d_in = out.shape[1]
    rows = max(1, _BLOCK.get(out.device.type, _BLOCK["cpu"]) // d_in)
    for start in range(0, len(out), rows):
        block = out[start : start + rows]
        drawn = normal_rows(seed, first_latent + start, len(block), d_in, out.device)
        block.copy_(drawn.div_(torch.linalg.vector_norm(drawn, dim=1, keepdim=True)))
