"""`export`: folders that other libraries' own loaders walk, alone and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore, Geometry
from flash_sae_dist.activations.writer import StoreWriter
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.launch import export
from flash_sae_dist.models.relu import ReLU, ReLUConfig
from flash_sae_dist.training.job import parse_config

HOOKPOINTS = ("model.layers.0", "model.layers.1.mlp")


def finished_grid(root: Path) -> dict[str, TopKSAE]:
    """Four SAEs as a grid leaves them, and the config that exports them."""
    saes = {}
    for hookpoint in HOOKPOINTS:
        for k in (2, 4):
            name = f"{hookpoint}/k={k}"
            sae = TopKSAE(12, 40, k)
            with torch.no_grad():
                sae.W_enc.add_(torch.randn_like(sae.W_enc))
            sae.save(root / "run" / name / "sae")
            train = {"hookpoint": hookpoint, "num_tokens": 1}
            job = {"output": "run", "sae": {"k": k, "d_sae": 40}, "train": train}
            (root / "run" / name / "job.yaml").write_text(yaml.safe_dump(job))
            saes[name] = sae
    (root / "c.yaml").write_text(yaml.safe_dump({"output": str(root / "run"), "trackers": []}))
    return saes


def check(root: Path, saes: dict[str, TopKSAE]) -> None:
    folder = root / "run/export"
    for name, sae in saes.items():
        hookpoint, values = name.split("/")
        for back in (
            interop.load(folder / "sae_lens" / name),
            interop.load(folder / "sparsify" / values / hookpoint),
        ):
            assert back.k == sae.k
            assert torch.equal(back.W_enc, sae.W_enc)
    assert len(list(folder.rglob("cfg.json"))) == 2 * len(saes)
    assert not list(folder.rglob("*.tmp"))


def test_every_sae_is_found_again(tmp_path: Path) -> None:
    saes = finished_grid(tmp_path)
    export.run(parse_config(yaml.safe_load((tmp_path / "c.yaml").read_text())))
    check(tmp_path, saes)


def finished_train(root: Path) -> dict[str, TopKSAE]:
    """An SAE of every hookpoint as `train` leaves it."""
    saes = {}
    for hookpoint in HOOKPOINTS:
        folder = root / "run" / hookpoint
        saes[hookpoint] = TopKSAE(12, 40, 3)
        saes[hookpoint].save(folder / "sae")
        train = {"hookpoint": hookpoint, "num_tokens": 1}
        job = {"output": "run", "sae": {"k": 3, "d_sae": 40}, "train": train}
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return saes


def test_train_puts_hookpoints_side_by_side(tmp_path: Path) -> None:
    finished_train(tmp_path)
    export.run(parse_config({"output": str(tmp_path / "run"), "trackers": []}))
    folder = tmp_path / "run/export/sparsify/train"
    assert sorted(f.name for f in folder.iterdir()) == sorted(HOOKPOINTS)
    # An SAE's own folder, named as output.
    export.run(parse_config({"output": str(tmp_path / "run" / HOOKPOINTS[0]), "trackers": []}))
    own = tmp_path / "run" / HOOKPOINTS[0] / "export/sparsify/train"
    assert [f.name for f in own.iterdir()] == [HOOKPOINTS[0]]


def test_what_a_format_cannot_hold_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finished_train(tmp_path)
    relu = ReLU(ReLUConfig(d_sae=40), 12)
    relu.save(tmp_path / "run" / HOOKPOINTS[0] / "sae")
    data = {"output": str(tmp_path / "run"), "trackers": []}
    export.run(parse_config(data | {"export": {"formats": ["sae_lens", "sparsify"]}}))
    folder = tmp_path / "run/export"
    assert sorted(f.name for f in (folder / "sae_lens").iterdir()) == sorted(HOOKPOINTS)
    assert [f.name for f in (folder / "sparsify/train").iterdir()] == [HOOKPOINTS[1]]
    told = [r.getMessage() for r in caplog.records if "left out of" in r.getMessage()]
    assert len(told) == 1
    assert HOOKPOINTS[0] in told[0]
    relu.save(tmp_path / "run" / HOOKPOINTS[1] / "sae")
    with pytest.raises(ConfigError, match="sparsify"):
        export.run(parse_config(data | {"export": {"formats": ["sparsify"]}}))


def test_no_folder_of_sparsify_holds_other_folders_beside_saes(tmp_path: Path) -> None:
    """Its load_many takes every folder for an SAE."""
    saes = finished_grid(tmp_path) | finished_train(tmp_path)
    export.run(parse_config({"output": str(tmp_path / "run"), "trackers": []}))
    found = sorted((tmp_path / "run/export/sparsify").rglob("cfg.json"))
    assert len(found) == len(saes)
    for side_by_side in {file.parents[1] for file in found}:
        assert sorted(f.name for f in side_by_side.iterdir()) == sorted(HOOKPOINTS)


@pytest.mark.parametrize("begins", [True, False])
def test_sae_lens_is_told_how_sequences_begin(tmp_path: Path, begins: bool) -> None:
    """Qwen's tokenizer, for one, has no begin token."""
    finished_grid(tmp_path)
    geometry, path = Geometry(16, 16, 16), str(tmp_path / "store.zarr")
    writer = StoreWriter(path, {}, create=True)
    writer.create(geometry, {"h": 12}, "float32", {"begin_token": begins})
    # Zeros are rows like others, to Zarr's reader and to ours.
    rows = {"activations/h": np.zeros((16, 12), np.float32)}
    rows |= {f"tokens/{n}": np.zeros(16, np.int32) for n in ("ids", "document", "position")}
    writer.write_shard(geometry, 0, rows)
    writer.finish(geometry, ["h"])
    with ActivationLoader(
        ActivationStore.open(path), "h", batch_tokens=16, seed=0, num_steps=1
    ) as loader:
        assert torch.equal(next(iter(loader)), torch.zeros(16, 12))
    export.run(parse_config({"output": str(tmp_path / "run"), "store": path, "trackers": []}))
    for file in (tmp_path / "run/export/sae_lens").rglob("cfg.json"):
        assert json.loads(file.read_text())["metadata"]["prepend_bos"] is begins


@pytest.mark.slow
def test_sparsify_loads_all_hookpoints_at_once(tmp_path: Path) -> None:
    """Those of `train` and of a grid in one output, as the README makes them."""
    library = pytest.importorskip("sparsify")
    saes = finished_grid(tmp_path) | finished_train(tmp_path)
    export.run(parse_config(yaml.safe_load((tmp_path / "c.yaml").read_text())))
    for values, k in (("k=2", 2), ("k=4", 4), ("train", 3)):
        folder = tmp_path / "run/export/sparsify" / values
        many = library.SparseCoder.load_many(str(folder), local=True)
        assert sorted(many) == sorted(HOOKPOINTS)
        for hookpoint, theirs in many.items():
            name = hookpoint if values == "train" else f"{hookpoint}/{values}"
            assert theirs.cfg.k == k
            assert torch.equal(theirs.encoder.weight, saes[name].W_enc)


@pytest.mark.slow
def test_two_processes_divide_the_saes(tmp_path: Path) -> None:
    saes = finished_grid(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launch, "-m", "flash_sae_dist.launch.export", str(tmp_path / "c.yaml")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    check(tmp_path, saes)
    # Counted, not split into lines: the processes share one pipe.
    told = run.stdout.count(" -> ")
    assert told == 2 * len(saes), "each SAE is written in both formats, by one process"
