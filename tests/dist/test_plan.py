"""Ranks never disagree on what is to be done, nor does one wait for another that has failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.training import made_of
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


def test_all_ranks_train_on_the_mesh_that_the_first_finds(config: Path, tmp_path: Path) -> None:
    """The same job as on a mesh that is asked for: how it is spread has no part in its identity."""
    first, second = run_ranks("tests.dist.plan_worker", 2, tmp_path, str(config), "auto")
    assert first[:3] == second[:3]
    shards, replicas, digest, weights = first
    assert (shards, replicas) in ((2, 1), (1, 2))
    cfg = load_config(config, [f"output={tmp_path / 'one'}"])
    (job,) = run_jobs(cfg, Accelerator(cpu=True), grid=False)
    record = made_of.read(job.folder)
    assert record is not None
    assert record["digest"] == digest
    torch.testing.assert_close(TopKSAE.load(job.folder / "sae").W_dec.data, weights)


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
