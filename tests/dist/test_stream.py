"""Two shards in two replicas train from the model itself: each rank runs it on its own share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.store import ActivationStore
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.dist.ranks import run_ranks
from tests.tiny_model import assert_same_rows, config_data, write_config

HOOKPOINT = "model.layers.0"


@pytest.mark.slow
def test_ranks_share_the_text_and_go_on_bit_for_bit(tmp_path: Path) -> None:
    data = config_data(tmp_path, num_tokens=10**6)
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    for key in ("store", "num_tokens"):
        del data["cache"][key]
    data["train"] |= {"source": "stream", "buffer_tokens": 300, "holdout": 0.0}
    data["train"] |= {"num_tokens": 20 * 128, "batch_tokens": 128, "precision": "float64"}
    data["train"] |= {"num_shards": 2, "num_replicas": 2, "checkpoint_every": 4}
    ranks = run_ranks(
        "tests.dist.stream_worker", 4, tmp_path / "out", str(write_config(tmp_path / "c", data))
    )
    for one, other in ((0, 1), (2, 3)):
        assert torch.equal(ranks[one]["batches"], ranks[other]["batches"]), "gathered over shards"
    seen = []
    for rank in ranks:
        own = rank["batches"].chunk(2, dim=1)[rank["place"][1]].flatten(0, 1)
        assert rank["epoch"] <= len(own)
        seen.append(own[: rank["epoch"]])
    want = store.read(f"activations/{HOOKPOINT}", 0, store.rows)
    assert_same_rows(torch.cat(seen), torch.from_numpy(want))
    for rank in ranks:
        assert rank["was_cut"]
        assert rank["whole"] == rank["cut"] == ranks[0]["whole"]
    # One process on the same batches.
    config = parse_config(data)
    assert config.sae is not None
    assert config.train is not None
    cpu = torch.device("cpu")
    training = SAETraining(config.sae, config.train, 16, Mesh.single(), cpu, rms=ranks[0]["rms"])
    batches = torch.cat([ranks[0]["batches"], ranks[2]["batches"]], dim=1)
    curve = [float(training.step(x, PhaseTimer(cpu, enabled=False)).fvu) for x in batches]
    assert len(curve) == 20
    assert [line[1] for line in ranks[0]["whole"]] == pytest.approx(curve, rel=1e-7)
