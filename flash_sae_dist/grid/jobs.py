"""From a config to its list of jobs."""

from __future__ import annotations

import itertools
from pathlib import Path

from ..config.base import ConfigError, match_names, nearest_name
from ..training.job import Config, with_values
from ..training.records import Job


def train_job(config: Config, hookpoints: list[str]) -> Job:
    """The one job of `train`. Raises ConfigError where its hookpoint is not in the store."""
    config.need("sae", "train", verb="train")
    assert config.train is not None
    name = config.train.hookpoint
    if name is None:
        raise ConfigError(
            f"train.hookpoint is missing: name one of the store's: {', '.join(hookpoints)}"
        )
    if name not in hookpoints:
        raise ConfigError(
            f"train.hookpoint={name!r} is not in the store{nearest_name(name, hookpoints)}"
        )
    return Job(name, Path(config.output) / name, config)


def _matched(pattern: str, hookpoints: list[str]) -> list[str]:
    """The store's hookpoints that a pattern names, as it would name modules in cache.hookpoints:
    `layers.*` are the blocks' outputs alone, `layers.*:input` their inputs.
    """
    stem, colon, side = pattern.partition(":")
    if colon and side not in ("input", "output"):
        raise ConfigError(f"grid.hookpoints: {pattern!r} must end in :input, :output or nothing")
    suffix = ":input" if side == "input" else ""
    parted = [name.partition(":") for name in hookpoints]
    names = [name for name, colon, end in parted if colon + end == suffix]
    return [name + suffix for name in match_names(stem, names)]


def expand(config: Config, hookpoints: list[str]) -> list[Job]:
    """The jobs of `grid`: every hookpoint of the store that a pattern names, with every
    combination of values.

    Each combination is checked as a config of its own. Raises ConfigError on a pattern that names
    nothing or a combination that does not fit.
    """
    config.need("sae", "train", "grid", verb="grid")
    assert config.grid is not None
    matched: list[str] = []
    for pattern in config.grid.hookpoints:
        found = hookpoints if pattern == "*" else _matched(pattern, hookpoints)
        if not found:
            raise ConfigError(
                f"grid.hookpoints: {pattern!r} is not in the store"
                f"{nearest_name(pattern, hookpoints)}"
            )
        matched += [name for name in found if name not in matched]
    keys = list(config.grid.values)
    jobs = []
    for hookpoint in matched:
        for choice in itertools.product(*config.grid.values.values()):
            values = dict(zip(keys, choice, strict=True))
            label = ",".join(f"{key.partition('.')[2]}={value}" for key, value in values.items())
            name = f"{hookpoint}/{label}" if label else hookpoint
            resolved = with_values(config, {"train.hookpoint": hookpoint, **values})
            jobs.append(Job(name, Path(config.output) / name, resolved))
    return jobs
