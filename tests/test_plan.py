"""The plan of a launch: which hookpoints a pattern names, and a name for every combination."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.grid.expansion import expand
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


def of_grid(**grid: object) -> list[str]:
    data = {
        "output": "runs/x",
        "sae": {"d_sae": 8},
        "train": {"num_tokens": 10},
        "grid": {"hookpoints": ["layers.*"], **grid},
    }
    return [job.name for job in expand(parse_config(data), STORE)]


POINTS = [{"sae.k": 2, "train.lr": "1e-3"}, {"sae.k": 4, "train.lr": 5e-4}]


def test_points_are_values_that_go_together() -> None:
    labels = [f"k={k},lr={lr}" for k, lr in ((2, 0.001), (4, 0.0005))]
    assert of_grid(points=POINTS) == [f"layers.{n}/{of}" for n in (0, 1) for of in labels]
    crossed = of_grid(points=POINTS, values={"train.seed": [0, 1]})
    assert crossed[:4] == [f"layers.0/seed={seed},{of}" for seed in (0, 1) for of in labels]
    assert len(crossed) == 8


def test_exclusions_drop_all_that_have_their_values() -> None:
    values = {"sae.k": [2, 4, 8], "train.seed": [0, 1]}
    found = of_grid(
        values=values,
        exclude=[{"sae.k": [4, 8], "train.seed": 1}, {"hookpoint": "*.1", "sae.k": 8}],
    )
    assert found == [
        *("layers.0/k=2,seed=0", "layers.0/k=2,seed=1", "layers.0/k=4,seed=0"),
        *("layers.0/k=8,seed=0", "layers.1/k=2,seed=0", "layers.1/k=2,seed=1"),
        "layers.1/k=4,seed=0",
    ]


def test_a_hookpoint_may_have_values_of_its_own() -> None:
    found = of_grid(
        values={"sae.k": [2, 4]},
        overrides={"layers.*": {"train.seed": 3}, "layers.1": {"sae.k": [8], "train.lr": [1, 2]}},
    )
    assert found == [
        *("layers.0/k=2,seed=3", "layers.0/k=4,seed=3"),
        *("layers.1/k=8,seed=3,lr=1", "layers.1/k=8,seed=3,lr=2"),
    ]


@pytest.mark.parametrize(
    ("grid", "told"),
    [
        ({"exclude": [{"sae.k": 16}]}, "grid.exclude: {'sae.k': .16,.} excludes nothing"),
        ({"exclude": [{"sae.k": [2, 4]}]}, "grid.exclude leaves no SAE to train"),
        ({"exclude": [{"hookpoint": "layers.7"}]}, "'layers.7' is not in grid.hookpoints"),
        ({"overrides": {"norm": {"sae.k": 1}}}, "grid.overrides: 'norm' is not in grid.hookpoints"),
        ({"points": [{"train.lr": 1}, {"train.lr": 1.0}]}, "grid.points: .* stands there twice"),
        ({"values": {"sae.k": [2, 16]}}, "sae.k=16"),
    ],
)
def test_mistakes_of_a_grid_are_told(grid: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        of_grid(**{"values": {"sae.k": [2, 4]}, **grid})


def test_the_grid_of_the_docs_holds() -> None:
    text = (Path(__file__).parents[1] / "docs/grids.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    data = {"output": "runs/x", "train": {"num_tokens": 10}, **yaml.safe_load(block)}
    jobs = expand(parse_config(data), [f"model.layers.{n}" for n in range(2)])
    of_first = [job.config for job in jobs if job.name.startswith("model.layers.0/")]
    assert len(jobs) == 4 + 10
    assert {c.sae.k for c in of_first if c.sae is not None} == {8, 16}  # type: ignore[attr-defined]
    assert {c.train.seed for c in of_first if c.train is not None} == {0}
