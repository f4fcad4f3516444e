"""Checkpoints: exact round trip, damage found, older one used, another number of shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sae_dist.config.train import FusedTrainConfig
from flash_sae_dist.models.dead_latents import DeadLatents
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.training import checkpoint
from flash_sae_dist.training.checkpoint import TrainingState
from flash_sae_dist.training.checkpoint_writer import CheckpointWriter, _tensors, write_shard
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining

CPU = torch.device("cpu")
MESH = Mesh.single()
CFG = FusedTrainConfig(
    num_tokens=640, batch_tokens=32, lr=1e-3, warmup_steps=2, dead_after_tokens=64
)


def training() -> SAETraining:
    return SAETraining(TopKConfig(k=3, d_sae=24), CFG, 8, MESH, CPU)


def advance(t: SAETraining, steps: int) -> list[float]:
    """Steps on batches that depend on the step alone."""
    losses = []
    for _ in range(steps):
        g = torch.Generator().manual_seed(t.step_index)
        metrics = t.step(torch.randn(32, 8, generator=g), PhaseTimer(CPU, enabled=False))
        losses.append(float(metrics.fvu))
    return losses


def save(folder: Path, t: SAETraining, *, keep: int) -> None:
    state = t.state()
    writer = CheckpointWriter("job", folder, state, MESH, CPU, keep, HostShare(1 << 30))
    writer.begin(state)
    writer.wait()
    writer.close()


def resume(folder: Path, t: SAETraining) -> int:
    newest = checkpoint.newest_step(folder, MESH)
    assert newest is not None
    t.load_state(checkpoint.load(folder, newest, 0, t.sae.d_sae_local))
    return newest


def test_resume_is_bit_exact(tmp_path: Path) -> None:
    whole = advance(training(), 12)
    first = training()
    before = advance(first, 5)
    save(tmp_path, first, keep=2)
    second = training()
    assert resume(tmp_path, second) == 5
    assert before + advance(second, 7) == whole


def test_keeps_the_newest(tmp_path: Path) -> None:
    t = training()
    for _ in range(4):
        advance(t, 1)
        save(tmp_path, t, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "bad manifest"])
def test_damage_is_found_and_the_older_one_used(tmp_path: Path, damage: str) -> None:
    t = training()
    advance(t, 1)
    save(tmp_path, t, keep=2)
    advance(t, 1)
    save(tmp_path, t, keep=2)
    newest = tmp_path / "step-00000002"
    file = newest / "shard-00000-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[:-100])
    elif damage == "remove":
        file.unlink()
    elif damage == "no manifest":
        (newest / "manifest.json").unlink()
    else:
        (newest / "manifest.json").write_text("{")
    assert checkpoint.newest_step(tmp_path, MESH) == 1
    with pytest.raises(checkpoint.DamagedCheckpointError) as raised:
        checkpoint._verify(newest)
    assert str(raised.value).count(str(newest)) == 1 + (damage in ("remove", "no manifest"))


def test_any_flipped_bit_of_a_manifest_is_found(tmp_path: Path) -> None:
    t = training()
    advance(t, 1)
    save(tmp_path, t, keep=2)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    whole = manifest.read_bytes()
    values = json.loads(whole)
    for bit in range(8 * len(whole)):
        torn = bytearray(whole)
        torn[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(torn)
        if checkpoint.newest_step(tmp_path, MESH) is not None:
            # White space between values alone may change.
            assert json.loads(torn) == values


def test_a_damaged_newest_one_does_not_cost_those_made_after(tmp_path: Path) -> None:
    t = training()
    advance(t, 3)
    save(tmp_path, t, keep=1)
    (tmp_path / "step-00000003" / "shard-00000-of-00001.safetensors").write_bytes(b"")
    assert checkpoint.newest_step(tmp_path, MESH) is None
    t = training()
    for made in (1, 2, 3):
        advance(t, 1)
        save(tmp_path, t, keep=1)
        assert checkpoint.newest_step(tmp_path, MESH) == made
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_partial_folder_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.partial").mkdir()
    assert checkpoint.newest_step(tmp_path, MESH) is None
    t = training()
    advance(t, 1)
    save(tmp_path, t, keep=2)
    assert checkpoint.newest_step(tmp_path, MESH) == 1


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_rows_load_on_any_number_of_shards(tmp_path: Path, num_shards: int) -> None:
    rows = torch.arange(24.0).reshape(12, 2)
    whole = torch.arange(3.0)
    folder = tmp_path / "step-00000007"
    files: list[dict[str, Any]] = []
    for shard in range(3):
        mesh = Mesh(0, 1, 0, 1, shard, 3, None, None, None)
        state = TrainingState(
            {"W": rows[shard * 4 : shard * 4 + 4]}, {"b": whole}, {"step": 7, "d_sae": 12}
        )
        files += write_shard(folder, _tensors(state, mesh), state.info, mesh)
    manifest = {"format": 1, "info": {"step": 7, "d_sae": 12}, "files": files}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    n = 12 // num_shards
    parts = [checkpoint.load(tmp_path, 7, i * n, n) for i in range(num_shards)]
    assert torch.equal(torch.cat([p.rows["W"] for p in parts]), rows)
    assert all(torch.equal(p.whole["b"], whole) for p in parts)
    with pytest.raises(checkpoint.DamagedCheckpointError, match="holds 4 of the 8"):
        checkpoint.load(tmp_path, 7, 8, 8)


def test_dead_latents_are_listed_as_before_after_a_resume(tmp_path: Path) -> None:
    """The list is of step 100; a checkpoint in between keeps it, not what is dead by then."""
    whole = advance(training(), 130)
    first = training()
    before = advance(first, 115)
    assert first.dead.any_listed
    assert not torch.equal(first.dead.listed(), first.dead.mask()), "some have fired or died since"
    save(tmp_path, first, keep=1)
    second = training()
    resume(tmp_path, second)
    assert torch.equal(second.dead.listed(), first.dead.listed())
    assert len(second.dead.rows) == len(first.dead.rows)
    assert before + advance(second, 15) == whole


def test_the_lists_memory_stays_while_its_length_goes_up_and_down() -> None:
    """Other memory is another captured graph, which takes as long as many steps."""
    dead = DeadLatents(4096, 10, Mesh.single(), torch.device("cpu"))
    first = dead.generation

    def listed(number: int) -> int:
        dead.list_(torch.arange(4096) % 4096 < number)
        assert dead.num_listed == number == int((dead.slots >= 0).sum())
        assert torch.equal(dead.rows[:number], torch.arange(number))
        assert not dead.rows[number:].any()
        dead.tokens_since_fired.fill_(11)
        assert int(dead.left_out().sum()) == len(dead.rows) - number
        return len(dead.rows)

    assert [listed(number) for number in (0, 3, 0, 40, 1, 64)] == [0, 64, 64, 64, 64, 64]
    assert dead.generation == first + 1
    assert [listed(number) for number in (1000, 900, 1024, 769, 0, 1000)] == [1024] * 6
    assert dead.generation == first + 2
    assert [listed(number) for number in (700, 1, 500)] == [704, 64, 512]


def test_checkpoints_of_the_first_version_go_on() -> None:
    """They have no list of dead latents: those that are dead are listed."""
    first = training()
    advance(first, 105)
    state = first.state()
    old = TrainingState(
        {name: rows for name, rows in state.rows.items() if name != "listed_dead"},
        state.whole,
        state.info | {"any_dead": True},
    )
    second = training()
    second.load_state(old)
    assert second.step_index == 105
    assert torch.equal(second.dead.listed(), first.dead.mask())
    losses = advance(second, 5)
    assert losses == pytest.approx(advance(first, 5), rel=1e-2)
