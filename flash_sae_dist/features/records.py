"""What is known of each latent as lines of text, a latent after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .collect import Collected
from .directions import Ranked
from .line_processes import LineProcesses
from .lines import QUANTILE_GROUPS, QUANTILES, Examples, Line, Part, lines_of
from .pairs import PairSpool
from .running import NUM_BINS
from .texts import Texts
from .words import Words

Array = npt.NDArray[Any]
_T = TypeVar("_T")
# Latents that are looked up together.
LATENTS_AT_ONCE = 256
# That look up latents while the text of those before is made.
_THREADS = 4
# Bins of the pass in one of a record's: a quarter of an octave.
_COARSE = 4


class Directions(NamedTuple):
    """What decoder rows point at."""

    nearest: Ranked
    raised: Ranked | None  # None without a model
    lowered: Ranked | None
    sources: tuple[str, ...] = ()  # a crosscoder's hookpoints
    norms: Tensor | None = None  # [L, S], of each one's decoder rows


def latent_lines(
    found: Collected,
    directions: Directions,
    spool: PairSpool,
    texts: Texts,
    words: Words,
    context_tokens: int,
    processes: LineProcesses,
) -> Iterator[Line]:
    """A line of each latent, in order. Threads look up the next ones, and have processes make
    their lines where there are any.
    """
    parts = [
        slice(first, min(first + LATENTS_AT_ONCE, len(found.latents)))
        for first in range(0, len(found.latents), LATENTS_AT_ONCE)
    ]
    top, sample = (rows.rows.cpu().numpy() for rows in (found.top, found.sample))

    def look_up(some: slice) -> Part:
        examples = _examples_of(top[some], sample[some], some.start, spool, texts, context_tokens)
        return _part_of(found, directions, some, examples)

    if not processes:
        for part in _in_threads(look_up, parts, _THREADS):
            yield from lines_of(part, words)
        return
    ids = [texts.ids, *(r.indices.cpu().numpy() for r in directions[1:3] if r is not None)]
    processes.begin(words.table(ids))
    made = _in_threads(lambda some: processes.lines_of(look_up(some)), parts, len(processes))
    for lines in made:
        yield from lines


def _in_threads(make: Callable[[slice], _T], parts: list[slice], threads: int) -> Iterator[_T]:
    """What it gives for each part, a few of them ahead."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_T]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(make, part))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _part_of(found: Collected, directions: Directions, some: slice, examples: Examples) -> Part:
    counts, (nearest, raised, lowered, sources, norms) = found.counts, directions
    by_bin = counts.by_bin()[some]
    return Part(
        latents=_host(found.latents[some]),
        tokens=counts.tokens,
        fired=_host(by_bin.sum(dim=1)),
        largest=_host(found.top.keys[some, 0].clamp_min(0).view(torch.float32)),
        sums=_host(counts.sums[some]),
        quantiles=_host(counts.quantiles(QUANTILES, some)),
        bins=_host(by_bin.view(-1, NUM_BINS // _COARSE, _COARSE).sum(dim=2)),
        edges=_host(counts.edges()[::_COARSE]),
        cosines=_host(nearest.scores[some]),
        nearest=_host(nearest.indices[some]),
        raised_logits=None if raised is None else _host(raised.scores[some]),
        raised=None if raised is None else _host(raised.indices[some]),
        lowered_logits=None if lowered is None else _host(lowered.scores[some]),
        lowered=None if lowered is None else _host(lowered.indices[some]),
        sources=sources,
        norms=None if norms is None else _host(norms[some]),
        examples=examples,
    )


def _host(values: Tensor) -> Array:
    return values.detach().cpu().numpy()


def _sampled(rows: Array, first: int, spool: PairSpool) -> tuple[Array, Array]:
    """The sampled rows [L, n] of each latent by falling activation, and which fifth of them each is
    in (0: the largest).
    """
    size = rows.shape[1]
    latents = np.repeat(np.arange(first, first + len(rows)), size)
    values = spool.values_at(rows.reshape(-1), latents).reshape(rows.shape)
    order = np.argsort(np.where(rows >= 0, -values, np.inf), axis=1, kind="stable")
    # A latent that was rarely active has a smaller sample, cut into as many parts.
    sizes = np.maximum(1, (rows >= 0).sum(axis=1, keepdims=True))
    return np.take_along_axis(rows, order, axis=1), np.arange(size) * QUANTILE_GROUPS // sizes


def _examples_of(
    top: Array, sample: Array, first: int, spool: PairSpool, texts: Texts, around: int
) -> Examples:
    """The examples of the latents from first on, [L, ...] rows each: those of the largest
    activations, then the sample.
    """
    sampled, fifth = _sampled(sample, first, spool)
    rows = np.concatenate([top, sampled], axis=1)
    groups = np.concatenate([np.zeros_like(top), fifth + 1], axis=1)
    has = rows >= 0
    latent, flat = np.nonzero(has)[0] + first, rows[has]
    windows, places = texts.windows(flat, around, around), texts.place[flat]
    width = 2 * around + 1
    values = spool.values_at(windows.rows.reshape(-1), np.repeat(latent, width))
    return Examples(
        np.cumsum(has.sum(axis=1)),
        groups[has],
        flat,
        texts.document[places],
        texts.position[places],
        values.reshape(-1, width),
        windows.ids,
        windows.inside,
    )
