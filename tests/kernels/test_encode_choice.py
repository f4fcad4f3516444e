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


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode_choice, "_CHOSEN", {})


def test_the_fastest_is_kept_for_later_runs(tmp_path: Path) -> None:
    folder = tmp_path / "deep"
    slow_first = designs(fused=100.0, tiles=60.0, library=80.0)
    assert tune(SHAPE, slow_first, folder=folder, time_us=measure) == "tiles"
    assert tune(SHAPE, slow_first, folder=folder, time_us=fail) == "tiles"
    (file,) = folder.iterdir()
    entry = json.loads(file.read_text())
    assert entry["design"] == "tiles"
    assert entry["us"] == {"fused": 100.0, "tiles": 60.0, "library": 80.0}
    assert "N=128, D=64, F=4096, k=8, dtype=bfloat16" in entry["about"]
    other = SHAPE._replace(N=256)
    assert tune(other, designs(fused=1.0, library=2.0), folder=folder, time_us=measure) == "fused"
    assert len(list(folder.iterdir())) == 2


def test_noise_does_not_change_the_first_choice(tmp_path: Path) -> None:
    near = designs(fused=100.0, tiles=97.0)
    assert tune(SHAPE, near, folder=tmp_path, time_us=measure) == "fused"


def test_what_this_process_uses_stays(tmp_path: Path) -> None:
    """Another SAE of the same shape would time a little otherwise."""
    use(SHAPE, "tiles")
    both = designs(fused=1.0, tiles=100.0)
    assert tune(SHAPE, both, folder=tmp_path, time_us=fail) == "tiles"
    assert encode_choice.chosen(SHAPE) == "tiles"


def test_other_designs_are_timed_anew(tmp_path: Path) -> None:
    tune(SHAPE, designs(fused=9.0, tiles=1.0), folder=tmp_path, time_us=measure)
    both = designs(fused=9.0, library=1.0)
    assert tune(SHAPE, both, folder=tmp_path, time_us=measure) == "library"


@pytest.mark.parametrize("text", ["{", "[1]", '{"about": 3}', "\x00"])
def test_a_broken_file_is_replaced(tmp_path: Path, text: str) -> None:
    two = designs(fused=1.0, library=2.0)
    tune(SHAPE, two, folder=tmp_path, time_us=measure)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    assert tune(SHAPE, two, folder=tmp_path, time_us=measure) == "fused"
    assert tune(SHAPE, two, folder=tmp_path, time_us=fail) == "fused"
    file.write_text(file.read_text().replace('"fused",', '["fused"],'))
    assert tune(SHAPE, two, folder=tmp_path, time_us=measure) == "fused"


def test_one_design_is_not_timed(tmp_path: Path) -> None:
    assert tune(SHAPE, designs(library=1.0), folder=tmp_path, time_us=fail) == "library"
    assert not list(tmp_path.iterdir())


def test_a_design_that_fails_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def measured(design: Any) -> float:
        if design() == 0:
            raise torch.OutOfMemoryError("no memory")
        return float(design())

    some = designs(fused=0.0, tiles=5.0, library=7.0)
    assert tune(SHAPE, some, folder=tmp_path, time_us=measured) == "tiles"
    assert "the encoder's design fused failed (no memory)" in caplog.text
    assert not list(tmp_path.iterdir()), "another time there may be memory"
    assert tune(SHAPE, designs(a=0.0, b=0.0), folder=tmp_path, time_us=measured) == "a"


def test_where_nothing_can_be_written_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    found = tune(SHAPE, designs(a=2.0, b=1.0), folder=tmp_path / "file" / "x", time_us=measure)
    assert found == "b"
    assert "cannot be written" in caplog.text


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert encode_choice.cache_folder() is None
    assert tune(SHAPE, designs(a=2.0, b=1.0), time_us=measure) == "b"


def test_pick_takes_what_is_used_else_the_first() -> None:
    calls = designs(fused=1.0, library=1.0)
    assert pick(SHAPE, calls) == "fused"
    use(SHAPE, "library")
    assert pick(SHAPE, calls) == "library"
    assert pick(SHAPE._replace(k=9), calls) == "fused"
    assert pick(SHAPE, designs(fused=1.0)) == "fused", "another GPU's design"


def test_choices_are_in_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert encode_choice.cache_folder() == tmp_path / "flash_sae_dist" / "encoder"


@pytest.mark.gpu
def test_designs_are_timed_and_the_choice_is_obeyed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from flash_sae_dist.kernels import encode_topk

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
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
    (file,) = (tmp_path / "flash_sae_dist" / "encoder").iterdir()
    times = json.loads(file.read_text())["us"]
    assert len(times) >= 2
    assert all(us > 0 for us in times.values())
