"""Adam's moments in 8 bits (bitsandbytes) on the autograd engine: shards, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.train import AutogradTrainConfig
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel.mesh import Mesh
from flash_sae_dist.planner import storage
from flash_sae_dist.planner.memory import kept_bytes, work_of
from flash_sae_dist.training import checkpoint, eight_bit
from flash_sae_dist.training.checkpoint_writer import CheckpointWriter
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining

D, F, K, BATCH = 256, 64, 4, 128
CPU = torch.device("cpu")
FEATURES = torch.randn(96, D, generator=torch.Generator().manual_seed(1))


def batch(step: int) -> Tensor:
    g = torch.Generator().manual_seed(step)
    return torch.rand(BATCH, 96, generator=g).pow(12) @ FEATURES + 0.5


def training(d_in: int = D, **options: Any) -> SAETraining:
    keys = {"moment_dtype": "8bit", "lr": 3e-3, "warmup_steps": 2, "dead_latents": "none"}
    cfg = AutogradTrainConfig(
        engine="autograd", num_tokens=100 * BATCH, batch_tokens=BATCH, **keys | options
    )
    return SAETraining(TopKConfig(d_sae=F, k=K), cfg, d_in, Mesh.single(), CPU)


def run(t: SAETraining, first: int, last: int) -> float:
    timer = PhaseTimer(CPU, enabled=False)
    return [float(t.step(batch(step), timer).fvu) for step in range(first, last)][-1]


@pytest.fixture(autouse=True)
def _library() -> None:
    pytest.importorskip("bitsandbytes")


def test_a_matrix_is_stepped_the_same_on_any_number_of_shards() -> None:
    g = torch.Generator().manual_seed(0)
    whole = torch.nn.Parameter(torch.randn(8, 2 * D, generator=g))
    parts = [torch.nn.Parameter(part.clone()) for part in whole.detach().chunk(4)]
    made = [
        eight_bit.eight_bit_adam([{"params": [p]}], lr=1e-2, betas=(0.9, 0.999), eps=1e-9)
        for p in (whole, *parts)
    ]
    for _ in range(20):
        # Latents of all sizes, as of rarely active ones.
        scale = torch.logspace(-12, 0, 8)[:, None]
        whole.grad = torch.randn(8, 2 * D, generator=g) * scale
        for param, grad in zip(parts, whole.grad.chunk(4), strict=True):
            param.grad = grad.clone()
        for optimizer in made:
            optimizer.step()
    assert torch.equal(torch.cat([p.detach() for p in parts]), whole.detach())
    for name in eight_bit.names_of(whole):
        kept = [eight_bit.kept(o, p, name) for o, p in zip(made[1:], parts, strict=True)]
        assert torch.equal(torch.cat(kept), eight_bit.kept(made[0], whole, name))
        assert len(kept[0]) == 2


def test_it_trains_as_float32_does_with_decay_for_the_matrices_alone() -> None:
    found = [run(training(moment_dtype=kind), 0, 60) for kind in ("8bit", "float32")]
    assert found[0] == pytest.approx(found[1], rel=0.03)
    assert found[0] < 0.8
    # Its first step reads no rounded moment yet.
    both = [
        training(moment_dtype=k, optimizer="adamw", weight_decay=0.1) for k in ("8bit", "float32")
    ]
    for t in both:
        run(t, 0, 1)
    for (name, got), want in zip(
        both[0].sae.named_parameters(), both[1].sae.parameters(), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def test_it_goes_on_bit_for_bit_and_keeps_what_the_planner_says(tmp_path: Path) -> None:
    whole, first, again = training(), training(), training(seed=5)
    run(whole, 0, 12)
    run(first, 0, 5)
    state = first.state()
    assert {len(tensor) for tensor in state.rows.values()} == {F}
    assert state.rows["state1.W_enc"].dtype == torch.uint8
    assert state.rows["absmax2.W_dec"].shape == (F, D // eight_bit.BLOCK)
    assert state.rows["state1.b_enc"].dtype == torch.float32
    mesh = Mesh.single()
    writer = CheckpointWriter("job", tmp_path, state, mesh, CPU, 2, HostShare(1 << 30))
    writer.begin(state)
    writer.wait()
    writer.close()
    again.load_state(checkpoint.load(tmp_path, 5, 0, F))
    half = checkpoint.load(tmp_path, 5, F // 2, F // 2)  # of the second of two shards
    assert all(torch.equal(t, state.rows[name][F // 2 :]) for name, t in half.rows.items())
    run(again, 5, 12)
    for part in ("rows", "whole"):
        for name, tensor in getattr(whole.state(), part).items():
            assert torch.equal(tensor, getattr(again.state(), part)[name]), name
    config = parse_config(
        {
            "store": "s.zarr", "output": "o", "sae": {"d_sae": F, "k": K},
            "train": {"hookpoint": "h", "num_tokens": 10 * BATCH, "batch_tokens": BATCH,
                      "engine": "autograd", "moment_dtype": "8bit"},
        }
    )  # fmt: skip
    planned = work_of("h", config, D, "float32", on_gpu=False)
    held = [*state.rows.values(), *state.whole.values()]
    assert sum(t.numel() * t.element_size() for t in held) == storage.checkpoint_bytes(planned)
    kept = [n for n in (*state.rows, *state.whole) if n.startswith(("state", "absmax"))]
    tensors = {**state.rows, **state.whole}
    moments = sum(tensors[n].numel() * tensors[n].element_size() for n in kept)
    assert moments == kept_bytes(planned, 1)["moments"]


def test_latents_that_begin_anew_have_no_moments() -> None:
    t = training()
    run(t, 0, 3)
    mask = torch.zeros(F, dtype=torch.bool)
    mask[3] = True
    t.engine.forget_(mask)
    rows = t.state().rows
    assert not rows["absmax1.W_enc"][3].any()
    assert rows["absmax1.W_enc"][2].all()
    assert not rows["state2.b_enc"][3]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="a row of width 24 is no multiple"):
        training(24)
    with pytest.raises(ConfigError, match="131072 x 32768 has more than the 2147483647 elements"):
        eight_bit.check_eight_bit(training().cfg, (F, D), (131_072, 32_768))
    for options in ({"optimizer": "muon"}, {"precision": "float64"}):
        with pytest.raises(ValueError, match="is of adam and adamw in float32, not of"):
            training(**options)
    monkeypatch.setattr(eight_bit, "_LIBRARY", "no_such_library")
    with pytest.raises(ConfigError, match="needs bitsandbytes; pip install"):
        training()
