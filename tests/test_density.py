"""Dense steps of architectures that select by threshold: the sparse ones' losses and weights, when
one follows the other, and what a checkpoint keeps of it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flash_sae_dist.launch import bench_density
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.engines.density import Density
from flash_sae_dist.training.step import SAETraining
from tests.test_architectures import AUTOGRAD, BATCH, SPARSE, run, training

CASES = [
    *((case, "autograd", {}) for case in ("gated", "relu_crosscoder", "jumprelu_target")),
    *(
        (case, "fused", {})
        for case in ("relu", "gated", "jumprelu", "jumprelu_quadratic", "jumprelu_tanh")
    ),
    ("jumprelu_target", "fused", {"grad_clip": 0.5}),
    ("jumprelu", "fused", {"adam_mode": "lazy"}),
    *(("jumprelu", engine, {"dead_latents": "auxk"}) for engine in ("fused", "autograd")),
    ("jumprelu", "fused", {"dead_latents": "ghost"}),
]


@pytest.mark.parametrize(("case", "engine", "options"), CASES, ids=str)
def test_dense_steps_are_the_sparse_ones(
    case: str, engine: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks that do not divide the batch."""
    found = []
    for shares in ((0.0, 0.0), SPARSE):
        monkeypatch.setitem(density.SHARES, "cpu", shares)
        t = training(case, engine, **options)
        assert t.engine.density is not None
        t.engine.density.block = 7
        if options.get("dead_latents"):
            # Some never fire again, and are listed at once.
            with torch.no_grad():
                t.sae.b_enc[::4] = -30.0
                t.engine.refresh_()
            t.dead.tokens_since_fired[::4] = 20 * BATCH
            t.step_index = 100
        losses = run(t, range(6))
        assert t.engine.density.is_dense == (shares != SPARSE)
        found.append((losses, t))
    (dense, a), (sparse, b) = found
    assert (dense[-1][1] > 0) == bool(options.get("dead_latents"))
    for ours, theirs in zip(dense, sparse, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-10, abs=1e-13)
    for name, tensor in b.sae.state_dict().items():
        torch.testing.assert_close(a.sae.state_dict()[name], tensor, rtol=1e-9, atol=1e-11)
    assert torch.equal(a.dead.tokens_since_fired, b.dead.tokens_since_fired)


@pytest.mark.parametrize("case", ["relu", "gated"])
def test_steps_become_sparse_once_and_go_on_bit_for_bit(
    case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The step is decided by what a checkpoint holds, wherever a run was killed."""
    engine = "autograd" if case in AUTOGRAD else "fused"
    monkeypatch.setitem(density.SHARES, "cpu", (0.0, 0.0))
    l0 = [line[2] for line in run(training(case, engine), range(12))]
    at = min(range(3, 11), key=lambda step: min(l0[:step]))
    limit = (l0[at] + min(l0[:at])) / 2 / 48 if l0[at] < min(l0[:at]) else l0[at] / 48 + 1e-9
    monkeypatch.setitem(density.SHARES, "cpu", (2 * limit, limit))
    forms: list[bool] = []

    def steps(t: SAETraining, some: range) -> list[tuple[float, ...]]:
        lines = []
        for step in some:
            lines += run(t, range(step, step + 1))
            assert t.engine.density is not None
            forms.append(t.engine.density.is_dense)
        return lines

    t = training(case, engine)
    caplog.clear()
    with caplog.at_level("INFO"):
        whole = steps(t, range(12))
    switch = forms.index(False)
    assert 0 < switch < 12
    assert not any(forms[switch:])
    told = [r.message for r in caplog.records if "steps are computed" in r.message]
    assert len(told) == 2
    assert told[0].startswith("step 0: L0 is not known yet, steps are computed densely in blocks")
    assert told[1].startswith(f"step {switch}: ")
    assert told[1].endswith("steps are computed sparsely")
    for killed in (switch - 1, switch, switch + 1):
        first, second = training(case, engine), training(case, engine)
        steps(first, range(killed))
        second.load_state(first.state())
        assert steps(second, range(killed, 12)) == whole[killed:]


def test_they_become_dense_again_at_a_look() -> None:
    t = training("relu", "fused")
    found = Density.of(t.sae)
    assert found is not None
    enter, leave = density.SHARES["cpu"]
    assert leave < enter
    assert not found.is_dense
    for step, share, dense in (
        (0, 0.0, True),
        (1, (enter + leave) / 2, True),
        (2, leave / 2, False),
        (3, 1.0, False),
        (100, (enter + leave) / 2, False),
        (200, (enter + 1) / 2, True),
    ):
        found.saw_(torch.tensor(share * t.sae.d_sae))
        found.choose(step)
        assert found.is_dense == dense, step
    assert Density.of(training("topk", "fused").sae) is None


def test_the_bench_times_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    bench_density.density(shape="32,16,64", share=[0.5, 0.1], repeats=1, cpu=True, json=None)
    out = capsys.readouterr().out
    assert "sparse / dense" in out
    assert "32.000" in out


def test_a_checkpoint_keeps_the_room_of_captured_steps() -> None:
    """Sums over lists of another length round otherwise. Older checkpoints tell none."""
    t = training("jumprelu", "fused")
    assert "room" not in t.state().info, "none on a CPU"
    t.engine.room = 192
    state, other = t.state(), training("jumprelu", "fused")
    other.load_state(state)
    assert other.engine.room == 192
    del state.info["room"]
    other.load_state(state)
    assert other.engine.room == 0
