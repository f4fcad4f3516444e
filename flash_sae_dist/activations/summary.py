"""What a store holds, and how its activations are distributed."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .damage import row_bytes
from .metadata import attributes
from .norm_limits import NormLimits
from .records import COMPLETE
from .store import ActivationStore, as_float64

Array = npt.NDArray[Any]
QUANTILES = (0.01, 0.5, 0.99, 0.999)
MASSIVE = 10  # times the median norm
_TOP = 5


class Distribution(NamedTuple):
    """Norms and dimensions of a sample of a hookpoint's rows."""

    rows: int
    rms: float  # of the elements
    mean_norm: float  # of the mean activation
    norms: dict[float, float]  # by quantile
    max_norm: float
    massive: float  # share of rows whose norm exceeds MASSIVE medians
    constant_dims: int  # dimensions that never change
    median_kurtosis: float  # 3 for a normal distribution
    top_dims: list[tuple[int, float, float]]  # number, kurtosis, share of the mean square


def describe(store: ActivationStore) -> dict[str, Any]:
    """All that a store tells of itself, as plain data."""
    told, records = attributes(store.records, store.sums), store.records
    config, geometry = store.config, store.geometry
    sizes = row_bytes(store)
    made_by = "merge" if "merged_from" in told else "cache" if store.knows_model() else "import"
    found: dict[str, Any] = {"path": store.path, "made_by": made_by}
    with suppress(OSError):
        date = records.files.modified(f"records/{COMPLETE}")
        found["date"] = date.isoformat(" ", "minutes")
    found |= {
        "rows": store.rows,
        "documents": store.num_documents(),
        "dtype": store.dtype,
        "bytes": store.rows * sum(sizes.values()),
        "shards": geometry.num_shards,
        "shard_rows": geometry.shard_rows,
        "chunk_rows": geometry.chunk_rows,
    }
    if store.over:
        each = {name: len(rows) for name, rows in store.over.items()}
        found["left_out"] = {"rows": len(store.left_out), "share": len(store.left_out) / store.rows}
        found["left_out"] |= {"above the limit of": each}
    if (limits := NormLimits.read(records)) is not None:
        found["norm_limits"] = {
            name: {"ratio": ratio, "median": limits.medians[name], "of_rows": limits.sample}
            for name, ratio in limits.ratios.items()
        }
    for section in ("model", "text", "cache", "import"):
        values = {k.partition(".")[2]: v for k, v in config.items() if k.startswith(f"{section}.")}
        found |= {section: {k: v for k, v in values.items() if v is not None}} if values else {}
    for key in ("model_commit", "imported_from", "merged_from", "versions"):
        found |= {key: told[key]} if told.get(key) else {}
    return found | {"hookpoints": {name: _hookpoint(store, name) for name in store.hookpoints}}


def _hookpoint(store: ActivationStore, name: str) -> dict[str, Any]:
    width, rms = store.width(name), store.root_mean_square(name)
    return {
        "width": width,
        "bytes": store.rows * row_bytes(store)[f"activations/{name}"],
        "rms": rms,
        "norm": None if rms is None else rms * width**0.5,
        "mean_norm": float(np.linalg.norm(store.mean(name))),
    }


def distribution(store: ActivationStore, hookpoint: str, num_rows: int) -> Distribution:
    """Of about num_rows rows in whole chunks from everywhere in a store, without those that are
    left out; of all where it has no more. Memory holds a chunk and the norms.
    """
    chunk = store.geometry.chunk_rows
    chunks = -(-store.rows // chunk)
    chosen = np.random.default_rng(0).permutation(chunks)[: -(-num_rows // chunk)]
    mean = store.mean(hookpoint)
    sums = np.zeros((4, store.width(hookpoint)))
    squares, norms = np.zeros(store.width(hookpoint)), []
    for start in np.sort(chosen) * chunk:
        found = store.read(
            f"activations/{hookpoint}", int(start), min(int(start) + chunk, store.rows)
        )
        rows = as_float64(found, store.dtype)
        here = (store.left_out >= start) & (store.left_out < start + chunk)
        rows = np.delete(rows, store.left_out[here] - start, axis=0)
        squares += np.square(rows).sum(axis=0)
        norms.append(np.linalg.norm(rows, axis=1))
        away = rows - mean
        power = np.ones_like(away)
        for total in sums:
            power = power * away
            total += power.sum(axis=0)
    return _distribution(np.concatenate(norms), sums, squares, mean)


def _distribution(norms: Array, sums: Array, squares: Array, mean: Array) -> Distribution:
    rows = len(norms)
    one, two, three, four = sums / rows
    variance = two - one**2
    fourth = four - 4 * one * three + 6 * one**2 * two - 3 * one**4
    varies = variance > 1e-12 * np.maximum(squares / rows, 1e-300)
    kurtosis = np.full(len(one), np.nan)
    kurtosis[varies] = fourth[varies] / variance[varies] ** 2
    top = np.argsort(-np.nan_to_num(kurtosis, nan=-1.0), kind="stable")[:_TOP]
    share = squares / max(float(squares.sum()), 1e-300)
    median = float(np.median(norms))
    return Distribution(
        rows,
        float(np.sqrt(squares.sum() / rows / len(one))),
        float(np.linalg.norm(mean)),
        {q: float(np.quantile(norms, q)) for q in QUANTILES},
        float(norms.max()),
        float((norms > MASSIVE * median).mean()),
        int((~varies).sum()),
        float(np.median(kurtosis[varies])) if varies.any() else float("nan"),
        [(int(d), float(kurtosis[d]), float(share[d])) for d in top if varies[d]],
    )
