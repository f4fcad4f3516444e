"""The jobs of a grid: hookpoints with combinations of values, each named by its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..config.base import ConfigError, match_names, nearest_name, sources_of
from ..config.run import GridConfig
from ..training.job import Config, own_choices, with_values
from ..training.records import Job


def expand(config: Config, hookpoints: list[str], where: str = "the store") -> list[Job]:
    """The jobs of `grid`: every hookpoint (of the store, or where they come from) that a pattern
    names, with every combination of values that is not excluded.

    Each combination is checked as a config of its own. Raises ConfigError on a pattern that names
    nothing or a combination that does not fit.
    """
    config.need("sae", "train", "grid", verb="grid")
    assert config.grid is not None
    matched = _chosen("grid.hookpoints", config.grid.hookpoints, hookpoints, where)
    jobs = []
    for hookpoint, values in _combinations(config.grid, matched):
        label = ",".join(f"{key.partition('.')[2]}={value}" for key, value in values.items())
        name = f"{hookpoint}/{label}" if label else hookpoint
        _check_name(name, list(values))
        resolved = with_values(config, {"train.hookpoint": hookpoint, **values})
        jobs.append(Job(name, Path(config.output) / name, resolved))
    return jobs


def _chosen(key: str, patterns: Iterable[str], hookpoints: list[str], where: str) -> list[str]:
    """The hookpoints that patterns name, each once. Raises ConfigError for one that names none."""
    matched: list[str] = []
    for pattern in patterns:
        found = hookpoints if pattern == "*" else _matched(key, pattern, hookpoints)
        if not found:
            raise ConfigError(
                f"{key}: {pattern!r} is not in {where}{nearest_name(pattern, hookpoints)}"
            )
        matched += [name for name in found if name not in matched]
    return matched


def _combinations(grid: GridConfig, hookpoints: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """Each hookpoint with each of its combinations of values. Raises ConfigError for an exclusion
    that is of no use, for points that are alike, or where nothing is left.
    """
    where = "grid.hookpoints"
    axes: dict[str, dict[str, tuple[Any, ...]]] = {name: dict(grid.values) for name in hookpoints}
    for pattern, override in grid.overrides.items():
        for name in _chosen("grid.overrides", [pattern], hookpoints, where):
            axes[name] |= override
    for at, point in enumerate(grid.points):
        if point in grid.points[:at]:
            raise ConfigError(f"grid.points: {point} stands there twice; drop one")
    found = [
        (name, values)
        for name, of in axes.items()
        for values in own_choices(
            dict(zip(of, choice, strict=True)) | point
            for choice in itertools.product(*of.values())
            for point in grid.points or ({},)
        )
    ]
    for rule in grid.exclude:
        named = rule.get("hookpoint", ("*",))
        of = set(_chosen("grid.exclude: hookpoint", named, hookpoints, where))
        kept = [one for one in found if one[0] not in of or not _has(one[1], rule)]
        if len(kept) == len(found):
            raise ConfigError(f"grid.exclude: {rule} excludes nothing; correct it or drop it")
        found = kept
    if not found:
        raise ConfigError("grid.exclude leaves no SAE to train; drop an exclusion")
    return found


def _has(values: dict[str, Any], rule: dict[str, tuple[Any, ...]]) -> bool:
    """Whether a combination has one of the values that an exclusion names of each key."""
    keys = rule.keys() - {"hookpoint"}
    return all(key in values and values[key] in rule[key] for key in keys)


def _matched(key: str, pattern: str, hookpoints: list[str]) -> list[str]:
    """The hookpoints that a pattern names, as it would name modules in cache.hookpoints:
    `layers.*` are the blocks' outputs alone, `layers.*:input` their inputs.
    """
    if len(names := sources_of(pattern)) > 1:
        # A crosscoder's, which are written out.
        return [pattern] if pattern in hookpoints or set(names) <= set(hookpoints) else []
    stem, colon, side = pattern.partition(":")
    if colon and side not in ("input", "output"):
        raise ConfigError(f"{key}: {pattern!r} must end in :input, :output or nothing")
    suffix = ":input" if side == "input" else ""
    parted = [name.partition(":") for name in hookpoints]
    names = [name for name, colon, end in parted if colon + end == suffix]
    return [name + suffix for name in match_names(stem, names)]


def _check_name(name: str, keys: list[str]) -> None:
    """Raises ConfigError for a job whose folder no file system takes."""
    for part in name.split("/"):
        if (size := len(os.fsencode(part))) > 255:
            raise ConfigError(
                f"grid.values gives a folder name of {size} bytes ({part[:60]!r}...), and file "
                f"systems take 255; move keys with one value ({', '.join(keys)[:200]}) to their "
                "sections, or split the grid"
            )
