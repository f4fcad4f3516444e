"""What is known of each latent as plain data, a latent after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .collect import QUANTILE_GROUPS, Collected
from .directions import Ranked
from .pairs import PairSpool
from .running import NUM_BINS
from .texts import Texts
from .words import Words

Array = npt.NDArray[Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Latents whose examples are looked up together.
LATENTS_AT_ONCE = 256
# Bins of the pass in one of a record's: a quarter of an octave.
_COARSE = 4
# Significant digits of what is only shown; an example's own activation is exact.
_DIGITS = 4


class Directions(NamedTuple):
    """What decoder rows point at."""

    nearest: Ranked
    raised: Ranked | None  # None without a model
    lowered: Ranked | None
    sources: tuple[str, ...] = ()  # a crosscoder's hookpoints
    norms: Tensor | None = None  # [L, S], of each one's decoder rows


def latent_records(
    found: Collected,
    directions: Directions,
    spool: PairSpool,
    texts: Texts,
    words: Words,
    context_tokens: int,
) -> Iterator[dict[str, Any]]:
    """A record of each latent, in order."""
    for first in range(0, len(found.latents), LATENTS_AT_ONCE):
        some = slice(first, min(first + LATENTS_AT_ONCE, len(found.latents)))
        examples = _examples_of(found, some, spool, texts, words, context_tokens)
        pointing = _directions_of(directions, some, words)
        numbers = _statistics(found, some)
        for record, shown, pointed in zip(numbers, examples, pointing, strict=True):
            yield record | pointed | {"examples": shown}


def _statistics(found: Collected, some: slice) -> list[dict[str, Any]]:
    counts = found.counts
    by_bin = counts.by_bin()[some]
    fired, quantiles = by_bin.sum(dim=1).tolist(), counts.quantiles(QUANTILES, some).tolist()
    largest = found.top.keys[some, 0].clamp_min(0).view(torch.float32).tolist()
    sums, edges = counts.sums[some].tolist(), counts.edges()[::_COARSE].tolist()
    bins = by_bin.view(-1, NUM_BINS // _COARSE, _COARSE).sum(dim=2).cpu().numpy()
    records: list[dict[str, Any]] = []
    for at, latent in enumerate(found.latents[some].tolist()):
        n = fired[at]
        record: dict[str, Any] = {"index": latent, "fired": n, "density": n / counts.tokens}
        record |= {"max": largest[at], "mean": sums[at] / n if n else 0.0}
        values = [min(float(f"{q:.{_DIGITS}g}"), largest[at]) for q in quantiles[at]] if n else []
        record["quantiles"] = dict(zip(map(str, QUANTILES), values, strict=False))
        (full,) = np.nonzero(bins[at])
        low, high = (int(full[0]), int(full[-1]) + 1) if len(full) else (0, 0)
        record["histogram"] = {
            "edges": [float(f"{e:.{_DIGITS}g}") for e in edges[low : high + 1]] if n else [],
            "counts": bins[at, low:high].tolist(),
        }
        records.append(record)
    return records


def _directions_of(found: Directions, some: slice, words: Words) -> Iterator[dict[str, Any]]:
    def numbers(ranked: Ranked) -> tuple[list[list[int]], list[list[float]]]:
        return ranked.indices[some].tolist(), ranked.scores[some].tolist()

    near, cosines = numbers(found.nearest)
    tokens = {
        name: numbers(ranked)
        for name, ranked in (("raised", found.raised), ("lowered", found.lowered))
        if ranked is not None
    }
    norms = [] if found.norms is None else found.norms[some].tolist()
    for at in range(len(near)):
        record: dict[str, Any] = {
            "nearest": [[n, round(c, _DIGITS)] for n, c in zip(near[at], cosines[at], strict=True)]
        }
        if norms:
            of = zip(found.sources, norms[at], strict=True)
            record["decoder_norms"] = {name: round(norm, _DIGITS) for name, norm in of}
        for name, (ids, logits) in tokens.items():
            texts = words.of(ids[at])
            record[name] = [
                [text, number, round(logit, _DIGITS)]
                for text, number, logit in zip(texts, ids[at], logits[at], strict=True)
            ]
        yield record


def _sampled(found: Collected, some: slice, spool: PairSpool) -> tuple[Array, Array]:
    """The sampled rows [L, n] of each latent by falling activation, and which fifth of them each is
    in (0: the largest).
    """
    rows = found.sample.rows[some].cpu().numpy()
    size = rows.shape[1]
    latents = np.repeat(np.arange(some.start, some.stop), size)
    values = spool.values_at(rows.reshape(-1), latents).reshape(rows.shape)
    order = np.argsort(np.where(rows >= 0, -values, np.inf), axis=1, kind="stable")
    # A latent that was rarely active has a smaller sample, cut into as many parts.
    sizes = np.maximum(1, (rows >= 0).sum(axis=1, keepdims=True))
    return np.take_along_axis(rows, order, axis=1), np.arange(size) * QUANTILE_GROUPS // sizes


def _group_names() -> list[str]:
    step = 100 // QUANTILE_GROUPS
    return ["top", *(f"{at - step}-{at}%" for at in range(100, 0, -step))]


def _examples_of(
    found: Collected, some: slice, spool: PairSpool, texts: Texts, words: Words, around: int
) -> Iterator[list[dict[str, Any]]]:
    """The examples of each latent: those of the largest activations, then the sample."""
    top = found.top.rows[some].cpu().numpy()
    sampled, fifth = _sampled(found, some, spool)
    rows = np.concatenate([top, sampled], axis=1)
    groups = np.concatenate([np.zeros_like(top), fifth + 1], axis=1)
    has = rows >= 0
    latent, flat, names = np.nonzero(has)[0] + some.start, rows[has], _group_names()
    windows, places = texts.windows(flat, around, around), texts.place[flat]
    width = 2 * around + 1
    values = spool.values_at(windows.rows.reshape(-1), np.repeat(latent, width))
    values, ends = values.reshape(-1, width), np.cumsum(has.sum(axis=1)).tolist()
    columns = zip(
        [names[group] for group in groups[has].tolist()],
        values[:, around].tolist(),
        windows.inside[:, :around].sum(axis=1).tolist(),
        flat.tolist(),
        texts.document[places].tolist(),
        texts.position[places].tolist(),
        windows.ids,
        values,
        windows.inside,
        strict=True,
    )
    shown = [_example(words, *column) for column in columns]
    for first, stop in zip([0, *ends[:-1]], ends, strict=True):
        yield shown[first:stop]


def _example(
    words: Words,
    group: str,
    value: float,
    at: int,  # place of the example's token among those that are shown
    row: int,
    document: int,
    position: int,
    ids: Array,  # [W]
    values: Array,  # [W]
    inside: Array,  # [W]
) -> dict[str, Any]:
    return {
        "group": group,
        "value": value,
        "row": row,
        "document": document,
        "position": position,
        "at": at,
        "tokens": words.of(ids[inside].tolist()),
        "values": [_shown(v) for v in values[inside].tolist()],
    }


def _shown(value: float) -> float | None:
    """0 where a latent was not active, None where the activation was not stored."""
    if value == 0:
        return 0
    return None if value != value else float(f"{value:.{_DIGITS}g}")
