"""Rows that are left out of a store for their norm: a few tokens have norms hundreds of times those
of all others, and dominate whatever is trained on them.

A limit is a hookpoint's ratio times its median norm, which is that of the store's first rows, a
sample that depends on the config alone; it is recorded before the first shard is made. A row above
the limit of one hookpoint is left out at all of them, whose rows are of the same tokens: zeros
stand in its place, statistics do not count it, loaders pass over it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config.base import ConfigError, match_names, nearest_name
from .records import Records

# A median of so many is within about 1% of a deviation of the norms.
SAMPLE_ROWS = 1 << 14
NORMS = "norms.json"
_ROWS_AT_ONCE = 4096
Ints = npt.NDArray[np.int64]


class NormLimits(NamedTuple):
    """What norms are too large, by hookpoint; of none where nothing is left out."""

    ratios: dict[str, float] = {}
    medians: dict[str, float] = {}
    sample: int = 0  # rows that the medians are of

    @property
    def limits(self) -> dict[str, float]:
        """Norms above which a row is left out."""
        return {name: ratio * self.medians[name] for name, ratio in self.ratios.items()}

    @classmethod
    def of(cls, key: str, ratios: dict[str, float], norms: Mapping[str, Tensor]) -> NormLimits:
        """Limits from a sample's norms [n] at each hookpoint that has a ratio. Raises ConfigError
        where most of a hookpoint's rows are zeros, or not finite.
        """
        medians = {name: float(np.median(norms[name].cpu().numpy())) for name in ratios}
        for name, median in medians.items():
            if not 0 < median < np.inf:
                raise ConfigError(
                    f"{key}: the median norm of {name} is {median:g}, of which no ratio makes a "
                    "limit; give ratios to other hookpoints alone, or store them in float32 where "
                    "it is not finite, and remove the store that was begun"
                )
        return cls(ratios, medians, max((len(n) for n in norms.values()), default=0))

    @classmethod
    def read(cls, records: Records) -> NormLimits | None:
        """Those that a store was begun with; None where there are none."""
        found = records.read(NORMS)
        if found is None:
            return None
        try:
            return cls(*(found[name] for name in cls._fields))
        except KeyError as e:
            raise records.damaged(NORMS, f"{e} is missing") from e

    def write(self, records: Records) -> None:
        """Records them in a store of which no shard is made."""
        records.write(NORMS, self._asdict())

    def over(self, norms: Mapping[str, Tensor]) -> dict[str, list[int]]:
        """Rows above the limit of each hookpoint that has one, by their norms [n]."""
        limits = self.limits
        return {n: (norms[n] > limits[n]).nonzero().flatten().tolist() for n in limits}

    def leave_out(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Writes zeros over the rows [n, D] of all hookpoints where one of them is above its limit;
        which are above it, [n] bool by hookpoint, where its rows are.
        """
        over = {name: row_norms(rows[name]) > limit for name, limit in self.limits.items()}
        for device in {values.device for values in rows.values()} if over else ():
            anywhere = reduce(torch.logical_or, [found.to(device) for found in over.values()])
            for values in rows.values():
                if values.device == device:
                    values.masked_fill_(anywhere[:, None], 0)
        return over


def row_norms(rows: Tensor) -> Tensor:  # [n, D] -> [n] float64
    """Norms of rows, computed where the rows are."""
    blocks = torch.split(rows, _ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(b, dim=1, dtype=torch.float64) for b in blocks])


def resolve_ratios(
    key: str, asked: float | Mapping[str, float] | None, hookpoints: Sequence[str]
) -> dict[str, float]:
    """The ratio of each hookpoint that has one. Raises ConfigError where a pattern names none."""
    if not isinstance(asked, Mapping):
        return {} if asked is None else dict.fromkeys(hookpoints, float(asked))
    found: dict[str, float] = {}
    for pattern, ratio in asked.items():
        stem, _, side = pattern.removesuffix(":output").partition(":")
        parted = [name.partition(":") for name in hookpoints]
        matched = match_names(stem, [name for name, _, end in parted if end == side])
        if not matched:
            near = nearest_name(pattern, list(hookpoints))
            raise ConfigError(f"{key}: {pattern!r} is none of the store's hookpoints{near}")
        end = f":{side}" if side else ""
        found |= {name + end: float(ratio) for name in matched}
    return {name: found[name] for name in hookpoints if name in found}


def parse_ratios(key: str, given: Sequence[str], hookpoints: Sequence[str]) -> dict[str, float]:
    """Ratios of a command line: one of all hookpoints, or NAME=RATIO of some. Raises
    ConfigError.
    """
    found: dict[str, float] = {}
    for argument in given:
        name, _, number = argument.rpartition("=")
        try:
            ratio = float(number)
        except ValueError:
            ratio = 0.0
        if not 1 < ratio < math.inf:
            raise ConfigError(
                f"{key}={argument} leaves out rows by no ratio; write a number above 1, such as "
                "10, or NAME=10 for a hookpoint"
            )
        found |= resolve_ratios(key, {name: ratio} if name else ratio, hookpoints)
    return found


def union(over: Mapping[str, Any]) -> Ints:
    """Rows that are in any hookpoint's list, ascending."""
    lists = [np.asarray(rows, dtype=np.int64) for rows in over.values()]
    return np.unique(np.concatenate(lists)) if lists else np.empty(0, np.int64)


def told(key: str, num_rows: int, over: Mapping[str, Any]) -> str:
    """One line of what was left out of a store."""
    left_out = len(union(over))
    each = ", ".join(f"{len(rows):,} for {name}" for name, rows in over.items())
    return f"{key} leaves out {left_out:,} of {num_rows:,} rows ({left_out / num_rows:.3%}): {each}"
