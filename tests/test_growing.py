"""A store that is given more tokens of its text is the store that would have been made at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from flash_sae_dist.activations import harvest, text_parts
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.records import Records
from flash_sae_dist.activations.store import ActivationStore, Geometry
from flash_sae_dist.activations.store_files import LocalFiles
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.training.job import parse_config
from tests.test_store_merge import assert_table_is_of_rows
from tests.tiny_model import config_data


def cached(root: Path, num_tokens: int, store: str = "store.zarr", **cache: Any) -> ActivationStore:
    data = config_data(root, num_tokens=num_tokens, **cache)
    data["cache"]["store"] = str(root / store)
    run_cache(parse_config(data), Accelerator(cpu=True))
    return ActivationStore.open(str(root / store))


@pytest.fixture
def cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts and shards so small that some of them stay, and no process of its own for the text,
    whose start takes seconds.
    """
    monkeypatch.setattr(Geometry, "enough_rows", 2**62)
    monkeypatch.setattr(text_parts, "_PART_TOKENS", 24 * 16)
    monkeypatch.setattr(harvest, "make_geometry", lambda rows, *_: Geometry(rows, 64, 16))


def assert_same_content(one: ActivationStore, other: ActivationStore) -> None:
    assert (one.rows, one.num_documents()) == (other.rows, other.num_documents())
    for name in [*(f"activations/{h}" for h in one.hookpoints), "tokens/ids", "tokens/document"]:
        np.testing.assert_array_equal(one.read(name, 0, one.rows), other.read(name, 0, one.rows))
    for hookpoint in one.hookpoints:
        np.testing.assert_array_equal(one.mean(hookpoint), other.mean(hookpoint))
    assert one.made_of()["parts"] == other.made_of()["parts"]


def shards(store: ActivationStore) -> dict[str, int]:
    folder = Path(store.path) / "activations/model.layers.0/c"
    return {file.parent.name: file.stat().st_ino for file in folder.rglob("*") if file.is_file()}


def test_more_tokens_are_added_to_what_stays(cut: None, tmp_path: Path) -> None:
    before = cached(tmp_path, 700)
    files = shards(before)
    grown = cached(tmp_path, 1300)
    stayed = {shard for shard, number in shards(grown).items() if files.get(shard) == number}
    assert {"0", "1", "2", "3"} <= stayed
    assert len(stayed) < len(files)
    grown.verify()
    assert_table_is_of_rows(grown)
    assert_same_content(grown, cached(tmp_path, 1300, "at_once.zarr"))
    # Nothing is left to do; less is refused.
    marks = shards(grown)
    assert shards(cached(tmp_path, 1300)) == marks
    with pytest.raises(ConfigError, match="num_tokens=700 differs from 1300"):
        cached(tmp_path, 700)


def test_a_small_store_is_begun_anew(tmp_path: Path) -> None:
    cached(tmp_path, 300, max_norm_ratio=3.0)
    grown = cached(tmp_path, 900, max_norm_ratio=3.0)
    grown.verify()
    assert_same_content(grown, cached(tmp_path, 900, "at_once.zarr", max_norm_ratio=3.0))


def test_launches_that_end_while_a_store_grows_go_on(
    cut: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another, each at one of the first records that it removes or writes."""
    cached(tmp_path, 700)
    left = [0]

    class Ended(UserError):
        """In place of a kill."""

    def counted(real: Any) -> Any:
        def do(self: Any, name: str, *args: Any) -> Any:
            left[0] -= "owner" not in name
            if left[0] == 0:
                raise Ended(name)
            return real(self, name, *args)

        return do

    with monkeypatch.context() as patch:
        patch.setattr(LocalFiles, "remove", counted(LocalFiles.remove))
        patch.setattr(Records, "write", counted(Records.write))
        for call in range(1, 10):
            left[0] = call
            with pytest.raises(Ended):
                cached(tmp_path, 1300)
        left[0] = 0
        grown = cached(tmp_path, 1300)
    grown.verify()
    assert_same_content(grown, cached(tmp_path, 1300, "at_once.zarr"))


def test_nothing_else_may_change(cut: None, tmp_path: Path) -> None:
    cached(tmp_path, 300)
    with pytest.raises(ConfigError, match=r"context_length=12 differs from 24"):
        cached(tmp_path, 900, context_length=12)
    with pytest.raises(ConfigError, match=r"hookpoints=.* differs from .*`flash-sae store merge`"):
        cached(tmp_path, 300, hookpoints=["model.layers.0", "model.layers.2"])
