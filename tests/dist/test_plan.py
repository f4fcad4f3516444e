"""Ranks never disagree on what is to be done, nor does one wait for another that has failed."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate import Accelerator

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.training.job import load_config
from tests.dist.ranks import run_ranks
from tests.tiny_model import config_data, write_config


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    file = write_config(root / "c.yaml", config_data(root))
    run_cache(load_config(file), Accelerator(cpu=True))
    return file


def test_all_ranks_have_the_first_ones_plan(config: Path, tmp_path: Path) -> None:
    first, second = run_ranks("tests.dist.plan_worker", 2, tmp_path, str(config), "finished")
    assert first == second
    unfinished, groups = first
    assert len(unfinished) == 4
    assert sorted(name for group in groups for name in group) == unfinished


@pytest.mark.parametrize(
    ("case", "first", "second"),
    [
        ("ConfigError", ["ConfigError", "a mistake"], ["ConfigError", "a mistake"]),
        ("UserError", ["UserError", "it is damaged"], ["UserError", "it is damaged"]),
        ("OSError", ["OSError", "disk lost"], ["UserError", "disk lost"]),
        (
            "RuntimeError",
            ["RuntimeError", "a bug"],
            ["UserError", "another process failed: RuntimeError: a bug"],
        ),
    ],
)
def test_a_mistake_that_the_first_finds_ends_all(
    config: Path, tmp_path: Path, case: str, first: list[str], second: list[str]
) -> None:
    assert run_ranks("tests.dist.plan_worker", 2, tmp_path, str(config), case) == [first, second]


def test_a_store_that_another_host_sees_later_is_waited_for(config: Path, tmp_path: Path) -> None:
    store, link = config.parent / "store.zarr", tmp_path / "late.zarr"
    rows = run_ranks("tests.dist.lag_worker", 2, tmp_path / "ranks", str(store), str(link))
    assert rows == [1500, 1500]
    assert "a shared file system may lag" in (tmp_path / "ranks" / "1.err").read_text()
