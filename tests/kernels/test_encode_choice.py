"""The choice of the encoder's design: kept in a file, the same ever after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sae_dist.kernels import encode_choice
from flash_sae_dist.kernels.encode_choice import Shape, pick, tune, use

SHAPE = Shape(128, 64, 4096, 8, "bfloat16")


def designs(**us: float) -> dict[str, Any]:
    """Designs whose call gives their time."""
    return {name: (lambda value=value: value) for name, value in us.items()}


def measure(design: Any) -> float:
    return float(design())


def fail(design: Any) -> float:
    raise AssertionError("timed though it is known")


def test_the_fastest_is_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "encoder.json"
    slow_first = designs(fused=100.0, tiles=60.0, library=80.0)
    assert tune(SHAPE, slow_first, file=file, time_us=measure) == "tiles"
    assert tune(SHAPE, slow_first, file=file, time_us=fail) == "tiles"
    (entry,) = json.loads(file.read_text()).values()
    assert entry == {"design": "tiles", "us": {"fused": 100.0, "tiles": 60.0, "library": 80.0}}
    other = SHAPE._replace(N=256)
    assert tune(other, designs(fused=1.0, library=2.0), file=file, time_us=measure) == "fused"
    assert len(json.loads(file.read_text())) == 2
    assert [path.name for path in file.parent.iterdir()] == ["encoder.json"]


def test_noise_does_not_change_the_first_choice(tmp_path: Path) -> None:
    near = designs(fused=100.0, tiles=97.0)
    assert tune(SHAPE, near, file=tmp_path / "a", time_us=measure) == "fused"


def test_a_design_that_no_longer_takes_the_shape_is_timed_anew(tmp_path: Path) -> None:
    file = tmp_path / "a"
    tune(SHAPE, designs(fused=9.0, tiles=1.0), file=file, time_us=measure)
    assert tune(SHAPE, designs(fused=9.0, library=1.0), file=file, time_us=measure) == "library"


@pytest.mark.parametrize("text", ["{", "[1]", '{"a": 3}', "\x00"])
def test_a_broken_file_is_replaced(tmp_path: Path, text: str) -> None:
    file = tmp_path / "encoder.json"
    file.write_text(text)
    two = designs(fused=1.0, library=2.0)
    assert tune(SHAPE, two, file=file, time_us=measure) == "fused"
    assert tune(SHAPE, two, file=file, time_us=fail) == "fused"


def test_one_design_is_not_timed(tmp_path: Path) -> None:
    assert tune(SHAPE, designs(library=1.0), file=tmp_path / "a", time_us=fail) == "library"
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = tune(SHAPE, designs(a=2.0, b=1.0), file=tmp_path / "file" / "x", time_us=measure)
    assert found == "b"
    assert "cannot be written" in caplog.text


def test_pick_takes_what_is_used_else_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_choice, "_CHOSEN", {})
    calls = designs(fused=1.0, library=1.0)
    assert pick(SHAPE, calls) == "fused"
    use(SHAPE, "library")
    assert pick(SHAPE, calls) == "library"
    assert pick(SHAPE._replace(k=9), calls) == "fused"
    assert pick(SHAPE, designs(fused=1.0)) == "fused", "another GPU's design"


def test_the_file_is_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert encode_choice.cache_file() == tmp_path / "flash_sae_dist" / "encoder.json"


@pytest.mark.gpu
def test_designs_are_timed_and_the_choice_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flash_sae_dist.kernels import encode_topk

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(encode_choice, "_CHOSEN", {})
    x = torch.randn(300, 768, device="cuda").bfloat16()
    W = torch.randn(8192, 768, device="cuda").bfloat16()
    b = torch.randn(8192, device="cuda")
    shape, name = encode_topk.tune(x, W, b, 32)
    assert (shape, name) == encode_topk.tune(x, W, b, 32)
    want = encode_topk.topk_encode(x, W, b, 32)
    for design in encode_topk.designs(x, W, b, 32):
        use(shape, design)
        got = encode_topk.topk_encode(x, W, b, 32)
        torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    entries = json.loads(encode_choice.cache_file().read_text())
    assert set(*(entry["us"] for entry in entries.values())) >= {"fused", "library"}
