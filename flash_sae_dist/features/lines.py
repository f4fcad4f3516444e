"""Latents as JSON lines, made of arrays alone: without torch, so that processes that make them
start at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .words import Words

Array = npt.NDArray[Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
QUANTILE_GROUPS = 5
# Tokens of the largest example that a list of latents shows, and of those that a latent raises or
# is active on.
_BEFORE, _AFTER, _FOCUS = 8, 4, 6
# Significant digits of what is only shown; an example's own activation is exact.
_DIGITS = 4
_as_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


class Line(NamedTuple):
    """A latent as the files have it."""

    json: bytes
    row: list[Any]  # of the list, which is searched by it: see _row


class Examples(NamedTuple):
    """Examples of neighbouring latents, one after another; W places each."""

    ends: Array  # [latents], where each latent's end
    group: Array  # [n], 0 the largest, then the fifths from the highest
    row: Array  # [n]
    document: Array  # [n]
    position: Array  # [n]
    values: Array  # [n, W] float32: 0 not active, NaN not stored
    ids: Array  # [n, W] int32
    inside: Array  # [n, W] bool, False beyond the sequence's ends


class Part(NamedTuple):
    """L neighbouring latents."""

    latents: Array  # [L]
    tokens: int  # of the pass
    fired: Array  # [L]
    largest: Array  # [L] float32
    sums: Array  # [L] float64, of activations
    quantiles: Array  # [L, len(QUANTILES)]
    bins: Array  # [L, B]
    edges: Array  # [B + 1]
    cosines: Array  # [L, n] of decoder rows
    nearest: Array  # [L, n], whose they are
    raised_logits: Array | None  # [L, m]
    raised: Array | None  # [L, m], token ids
    lowered_logits: Array | None
    lowered: Array | None
    sources: Sequence[str]  # a crosscoder's hookpoints
    norms: Array | None  # [L, S], of each one's decoder rows
    examples: Examples


def lines_of(part: Part, words: Words) -> list[Line]:
    """A line of each latent."""
    known = map(dict.__or__, _statistics(part), _directions(part, words))
    lines = []
    for fields, (examples, focus, largest) in zip(known, _shown(part.examples, words), strict=True):
        text = f'{_as_json(fields)[:-1]},"examples":{examples}}}'
        lines.append(Line(text.encode(), _row(fields, focus, largest)))
    return lines


def _row(fields: dict[str, Any], focus: list[str], largest: list[str]) -> list[Any]:
    """What the list shows and is searched by: number, density, largest and mean activation, tokens
    it raises, tokens it is active on, and the largest example in three parts.
    """
    raised = [text for text, *_ in fields.get("raised", [])[:_FOCUS]]
    numbers = [_rounded(fields[name]) for name in ("density", "max", "mean")]
    return [fields["index"], *numbers, raised, focus[:_FOCUS], largest]


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _statistics(part: Part) -> Iterator[dict[str, Any]]:
    edges = [_rounded(edge) for edge in part.edges.tolist()]
    columns = zip(
        part.latents.tolist(),
        part.fired.tolist(),
        part.largest.tolist(),
        part.sums.tolist(),
        part.quantiles.tolist(),
        part.bins.tolist(),
        (part.bins > 0).argmax(axis=1).tolist(),
        (part.bins.shape[1] - (part.bins[:, ::-1] > 0).argmax(axis=1)).tolist(),
        strict=True,
    )
    for latent, n, largest, total, quantiles, bins, low, high in columns:
        values = [min(_rounded(q), largest) for q in quantiles] if n else []
        yield {
            "index": latent,
            "fired": n,
            "density": n / part.tokens,
            "max": largest,
            "mean": total / n if n else 0.0,
            "quantiles": dict(zip(map(str, QUANTILES), values, strict=False)),
            "histogram": {
                "edges": edges[low : high + 1] if n else [],
                "counts": bins[low:high] if n else [],
            },
        }


def _directions(part: Part, words: Words) -> Iterator[dict[str, Any]]:
    cosines, near = part.cosines.tolist(), part.nearest.tolist()
    norms = [] if part.norms is None else part.norms.tolist()
    columns = (
        ("raised", part.raised, part.raised_logits),
        ("lowered", part.lowered, part.lowered_logits),
    )
    tokens = {
        name: (ids.tolist(), logits.tolist())
        for name, ids, logits in columns
        if ids is not None and logits is not None
    }
    for at in range(len(near)):
        record: dict[str, Any] = {
            "nearest": [[n, round(c, _DIGITS)] for n, c in zip(near[at], cosines[at], strict=True)]
        }
        if norms:
            of = zip(part.sources, norms[at], strict=True)
            record["decoder_norms"] = {name: round(norm, _DIGITS) for name, norm in of}
        for name, (ids, logits) in tokens.items():
            record[name] = [
                [text, number, round(logit, _DIGITS)]
                for text, number, logit in zip(words.of(ids[at]), ids[at], logits[at], strict=True)
            ]
        yield record


def _shown(found: Examples, words: Words) -> Iterator[tuple[str, list[str], list[str]]]:
    """Of each latent its examples as JSON, the tokens of its largest activations, each once, and
    the text before the largest one's token, that token, and the text behind it.
    """
    around, is_top = found.ids.shape[1] // 2, found.group == 0
    begins = found.inside.argmax(axis=1)
    stops = begins + found.inside.sum(axis=1)
    pieces = _pieces(found, begins, stops, words)
    first = 0
    for stop in found.ends.tolist():
        text = "".join(pieces[first:stop].ravel().tolist())
        focus = dict.fromkeys(words.of(found.ids[first:stop, around][is_top[first:stop]].tolist()))
        largest = ["", "", ""]
        if stop > first:
            a, b = max(begins[first], around - _BEFORE), min(stops[first], around + 1 + _AFTER)
            of, at = words.of(found.ids[first, a:b].tolist()), around - a
            largest = ["".join(of[:at]), of[at], "".join(of[at + 1 :])]
        # Without the last comma.
        yield f"[{text[:-1]}]", list(focus), largest
        first = stop


def _pieces(found: Examples, begins: Array, stops: Array, words: Words) -> Array:
    """Each example as pieces [n, 2 W + 3] of JSON text, which need only be joined: a string of each
    number and token was nine tenths of the time.
    """
    count, width = found.ids.shape
    pieces = np.empty((count, 2 * width + 3), dtype=object)
    tokens, values = pieces[:, 1 : width + 1], pieces[:, width + 2 : -1]
    pieces[:, 0] = _heads(found, begins)
    tokens[:] = words.as_json(found.ids)
    pieces[:, width + 1] = '],"values":['
    values[:] = "0,"
    values[np.isnan(found.values)] = "null,"
    active = found.values > 0
    values[active] = [f"{_rounded(v)!r}," for v in found.values[active].tolist()]
    pieces[:, -1] = "]},"
    every = np.arange(count)
    for part in (tokens, values):
        part[~found.inside] = ""
        part[every, stops - 1] = [text[:-1] for text in part[every, stops - 1]]
    return pieces


def _heads(found: Examples, begins: Array) -> list[str]:
    """What stands before the tokens of each example."""
    step, around = 100 // QUANTILE_GROUPS, found.ids.shape[1] // 2
    names = ["top", *(f"{at - step}-{at}%" for at in range(100, 0, -step))]
    columns = zip(
        found.group.tolist(),
        found.values[:, around].tolist(),
        found.row.tolist(),
        found.document.tolist(),
        found.position.tolist(),
        (around - begins).tolist(),
        strict=True,
    )
    return [
        f'{{"group":"{names[group]}","value":{value!r},"row":{row},"document":{document},'
        f'"position":{position},"at":{at},"tokens":['
        for group, value, row, document, position, at in columns
    ]
