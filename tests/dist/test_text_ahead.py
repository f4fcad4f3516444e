"""Several processes make rows of a text that is still being tokenised."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flash_sae_dist.activations.store import ActivationStore
from tests.dist.ranks import free_port, rank_env, start_module, wait
from tests.tiny_model import config_data, save_text, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    data = config_data(tmp_path, shard_mib=0.002, num_tokens=12_000)
    save_text(tmp_path / "text.jsonl", documents=700)
    return write_config(tmp_path / "c.yaml", data)


def cached(config: Path, name: str, world: int) -> tuple[list[int], list[str]]:
    port, store = free_port(), f"cache.store={config.parent / name}"
    processes = [
        start_module(
            "tests.dist.parts_worker",
            [str(config), store],
            rank_env(rank, world, port),
            config.parent / f"{name}-{rank}.log",
        )
        for rank in range(world)
    ]
    codes = wait(processes, timeout=180)
    return codes, [process.text() for process in processes]


def test_two_processes_make_the_store_that_one_makes(config: Path) -> None:
    stores = []
    for world in (1, 2):
        codes, told = cached(config, f"{world}.zarr", world)
        assert codes == [0] * world, told
        stores.append(ActivationStore.open(str(config.parent / f"{world}.zarr")))
        stores[-1].verify()
    one, two = stores
    assert one.geometry == two.geometry
    for name in ("tokens/ids", "tokens/document", "activations/model.layers.0"):
        assert np.array_equal(one.read(name, 0, one.rows), two.read(name, 0, two.rows)), name
    assert len(list((config.parent / "2.zarr/records").glob("text-*.json"))) > 10


def test_what_ends_the_tokenising_ends_all_with_its_sentence(config: Path) -> None:
    file = config.parent / "text.jsonl"
    file.write_text("\n".join([*file.read_text().splitlines()[:300], "no JSON"]))
    codes, told = cached(config, "s.zarr", 2)
    assert codes == [2, 2], told
    assert all("cannot be read" in text for text in told)
