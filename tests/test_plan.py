"""The plan of a launch: which hookpoints a pattern names, and a name for every combination."""

from __future__ import annotations

import pytest

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.grid.plan import expand
from flash_sae_dist.training.job import parse_config

STORE = [f"layers.{i}{side}" for side in ("", ":input") for i in range(2)] + ["norm:input"]


def names(patterns: list[str], values: dict[str, list[object]] | None = None) -> list[str]:
    data = {
        "output": "runs/x",
        "sae": {"k": 2, "d_sae": 8},
        "train": {"num_tokens": 10},
        "grid": {"hookpoints": patterns, "values": values or {}},
    }
    return [job.name for job in expand(parse_config(data), STORE)]


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["*"], STORE),
        (["layers.*"], ["layers.0", "layers.1"]),
        (["layers.*:output"], ["layers.0", "layers.1"]),
        (["layers.*:input"], ["layers.0:input", "layers.1:input"]),
        (["**:input"], ["layers.0:input", "layers.1:input", "norm:input"]),
        (["layers.1", "layers.*"], ["layers.1", "layers.0"]),
        (["layers.0:input"], ["layers.0:input"]),
    ],
)
def test_a_pattern_means_what_it_means_in_cache(patterns: list[str], found: list[str]) -> None:
    """`layers.*` trained SAEs on the blocks' inputs, too, where the store had them."""
    assert names(patterns) == found


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("layers.*:inputs", "must end in :input, :output or nothing"),
        ("norm", "'norm' is not in the store; did you mean 'norm:input'"),
        ("layers.7", "'layers.7' is not in the store"),
    ],
)
def test_a_pattern_that_names_nothing_is_told(pattern: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        names([pattern])


def test_every_combination_has_a_name_of_its_own() -> None:
    values: dict[str, list[object]] = {"sae.k": [1, 2], "train.lr": [1e-3, "1e-4"]}
    assert names(["layers.0"], values) == [
        f"layers.0/k={k},lr={lr}" for k in (1, 2) for lr in (0.001, 0.0001)
    ]
