"""What is known of each latent as plain data, a latent after another."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .collect import QUANTILE_GROUPS, Collected
from .directions import Ranked
from .pairs import PairSpool
from .running import NUM_BINS
from .texts import Texts, Windows
from .words import Words

Array = npt.NDArray[Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
# Latents whose examples are looked up together.
LATENTS_AT_ONCE = 256
# That look up examples while the text of those before is made.
_THREADS = 4
# Tokens of the largest example that a list of latents shows.
BEFORE, AFTER = 8, 4
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


class LatentRecord(NamedTuple):
    """What is known of a latent."""

    fields: dict[str, Any]  # all but its examples
    examples: str  # as JSON text: they are nearly all of it, and slow to make as plain data
    focus: list[str]  # tokens of its largest activations, each once
    largest: list[str]  # text before the largest one's token, that token, text behind it, if any


def latent_records(
    found: Collected,
    directions: Directions,
    spool: PairSpool,
    texts: Texts,
    words: Words,
    context_tokens: int,
) -> Iterator[LatentRecord]:
    """A record of each latent, in order. Threads look up the examples of the next ones."""
    parts = [
        slice(first, min(first + LATENTS_AT_ONCE, len(found.latents)))
        for first in range(0, len(found.latents), LATENTS_AT_ONCE)
    ]
    top, sample = (rows.rows.cpu().numpy() for rows in (found.top, found.sample))

    def look_up(some: slice) -> _Examples:
        return _examples_of(top[some], sample[some], some.start, spool, texts, context_tokens)

    for some, examples in zip(parts, _in_threads(look_up, parts), strict=True):
        pointing = _directions_of(directions, some, words)
        numbers = _statistics(found, some)
        shown = _shown(examples, words, context_tokens)
        for fields, pointed, (text, focus, largest) in zip(numbers, pointing, shown, strict=True):
            yield LatentRecord(fields | pointed, text, focus, largest)


def _in_threads(look_up: Callable[[slice], _Examples], parts: list[slice]) -> Iterator[_Examples]:
    """What it gives for each part, a few of them ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        waiting: deque[Future[_Examples]] = deque()
        try:
            for part in parts:
                waiting.append(pool.submit(look_up, part))
                if len(waiting) > _THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


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


class _Examples(NamedTuple):
    """Examples of neighbouring latents, one after another; W places each."""

    ends: list[int]  # [latents], where each latent's end
    group: Array  # [n], 0 the largest, then the fifths from the highest
    row: Array  # [n]
    document: Array  # [n]
    position: Array  # [n]
    values: Array  # [n, W] float32
    windows: Windows


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


def _group_names() -> list[str]:
    step = 100 // QUANTILE_GROUPS
    return ["top", *(f"{at - step}-{at}%" for at in range(100, 0, -step))]


def _examples_of(
    top: Array, sample: Array, first: int, spool: PairSpool, texts: Texts, around: int
) -> _Examples:
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
    return _Examples(
        np.cumsum(has.sum(axis=1)).tolist(),
        groups[has],
        flat,
        texts.document[places],
        texts.position[places],
        values.reshape(-1, width),
        windows,
    )


def _shown(
    found: _Examples, words: Words, around: int
) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each latent the JSON text of its examples, and what LatentRecord has of them beside."""
    firsts, stops = _insides(found.windows)
    texts = _example_texts(found, firsts, stops, words, around)
    ids, is_top = found.windows.ids, found.group == 0
    first = 0
    for stop in found.ends:
        focus = dict.fromkeys(words.of(ids[first:stop, around][is_top[first:stop]].tolist()))
        largest: list[str] = []
        if stop > first:
            a, b = max(firsts[first], around - BEFORE), min(stops[first], around + 1 + AFTER)
            text, at = words.of(ids[first, a:b].tolist()), around - a
            largest = ["".join(text[:at]), text[at], "".join(text[at + 1 :])]
        yield f"[{','.join(texts[first:stop])}]", list(focus), largest
        first = stop


def _insides(windows: Windows) -> tuple[list[int], list[int]]:
    """Where each window's sequence begins and ends in it: what is inside are neighbours."""
    firsts = windows.inside.argmax(axis=1)
    return firsts.tolist(), (firsts + windows.inside.sum(axis=1)).tolist()


def _example_texts(
    found: _Examples, firsts: list[int], stops: list[int], words: Words, around: int
) -> list[str]:
    """Each example as JSON text."""
    names = [json.dumps(name) for name in _group_names()]
    columns = zip(
        found.group.tolist(),
        found.values[:, around].tolist(),
        found.row.tolist(),
        found.document.tolist(),
        found.position.tolist(),
        firsts,
        stops,
        words.as_json(found.windows.ids).tolist(),
        _values_as_json(found.values).tolist(),
        strict=True,
    )
    return [
        f'{{"group":{names[group]},"value":{value!r},"row":{row},"document":{document},'
        f'"position":{position},"at":{around - a},"tokens":[{",".join(tokens[a:b])}],'
        f'"values":[{",".join(values[a:b])}]}}'
        for group, value, row, document, position, a, b, tokens, values in columns
    ]


def _values_as_json(values: Array) -> npt.NDArray[np.object_]:
    """0 where a latent was not active, null where the activation was not stored."""
    texts = np.full(values.shape, "0", dtype=object)
    texts[np.isnan(values)] = "null"
    active = values > 0
    texts[active] = [repr(float(f"{v:.{_DIGITS}g}")) for v in values[active].tolist()]
    return texts
