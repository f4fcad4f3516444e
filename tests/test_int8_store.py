"""int8 rows with a scale a row: what they lose, and that a store of them is a store like others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.importing import ImportOptions, run_import
from flash_sae_dist.activations.merging import run_merge
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError
from flash_sae_dist.activations.stored_rows import StoredRows, decode_int8, encode_int8
from flash_sae_dist.activations.summary import distribution
from flash_sae_dist.config.base import UserError
from flash_sae_dist.launch.cli import build
from flash_sae_dist.training.job import parse_config
from tests.test_store_import import assert_same
from tests.tiny_model import config_data

RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    width=st.integers(1, 40),
    exponent=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 2**31),
)
def test_an_element_is_off_by_half_a_step_at_most(
    rows: int, width: int, exponent: int, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, width, generator=generator) * 2.0**exponent).to(dtype)
    x[0] = 0
    codes, scales = encode_int8(x)
    assert codes.dtype == torch.int8
    assert int(codes.abs().max()) <= 127
    out = decode_int8(codes, scales, torch.empty(rows, width))
    assert (out[0] == 0).all()
    wide = x.double()
    assert ((out - wide).abs() <= scales[:, None].double() * 0.5001).all()
    at = wide.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(out.double().gather(1, at), wide.gather(1, at), rtol=1e-6, atol=0)
    again = encode_int8(out)
    assert torch.equal(again[0], codes), "encoding is a projection"
    half = decode_int8(codes, scales, torch.empty(rows, width, dtype=torch.bfloat16))
    assert torch.equal(half, out.bfloat16()), "rounded once"


@pytest.mark.gpu
def test_decoding_on_a_gpu_is_that_of_the_cpu() -> None:
    x = torch.randn(4096, 768) * torch.rand(4096, 1) * 100
    codes, scales = encode_int8(x)
    for dtype in (torch.float32, torch.bfloat16):
        want = decode_int8(codes, scales, torch.empty_like(x, dtype=dtype))
        out = torch.empty_like(x, dtype=dtype, device="cuda")
        assert torch.equal(decode_int8(codes.cuda(), scales.cuda(), out).cpu(), want)
    on_gpu = encode_int8(x.cuda())
    torch.testing.assert_close(on_gpu[1].cpu(), scales, rtol=1e-6, atol=0)


def make(folder: Path, name: str, seed: int = 0, rows: int = 1500) -> str:
    x = np.random.default_rng(seed).standard_normal((rows, 24)) * 7 + 1
    np.save(folder / f"{seed}.npy", x.astype("float32"))
    named = [f"h.{seed}={folder}/{seed}.npy"]
    run_import(str(folder / name), named, ImportOptions("int8", shard_mib=0.005))
    return str(folder / name)


def test_an_int8_store_of_own_rows(tmp_path: Path) -> None:
    store = ActivationStore.open(make(tmp_path, "s"))
    store.verify()
    assert store.dtype == "int8"
    x = np.load(tmp_path / "0.npy")[store.read("tokens/document", 0, store.rows)]
    rows = store.read("activations/h.0", 0, store.rows)
    assert rows.dtype == np.float32
    assert np.square(rows - x).sum() / np.square(x).sum() < 1e-4
    want = StoredRows.encode(torch.from_numpy(x), "int8")
    assert np.array_equal(store.read_stored("activations/h.0", 0, store.rows), want.bits)
    assert np.array_equal(store.read("scales/h.0", 0, store.rows), want.scales)
    np.testing.assert_allclose(store.mean("h.0"), rows.astype(np.float64).mean(0), atol=1e-12)
    rms = np.sqrt(np.square(rows.astype(np.float64)).mean())
    assert store.root_mean_square("h.0") == pytest.approx(rms)
    assert distribution(store, "h.0", store.rows).rms == pytest.approx(rms)
    assert store.geometry.num_shards > 4
    result = RUNNER.invoke(build(), ["store", "info", store.path, "--json"])
    told = json.loads(result.output)
    assert told["hookpoints"]["h.0"]["bytes"] == 1500 * 24
    assert told["bytes"] == 1500 * (24 + 4 + 12)


@pytest.mark.parametrize("array", ["activations/h.0/c/2/0", "scales/h.0/c/2"])
def test_a_flipped_or_lost_file_of_it_is_told_and_made_again(tmp_path: Path, array: str) -> None:
    store = ActivationStore.open(make(tmp_path, "s"))
    file = tmp_path / "s" / array
    whole = file.read_bytes()
    file.write_bytes(whole[:9] + bytes([whole[9] ^ 1]) + whole[10:])
    with pytest.raises(DamagedStoreError, match=array):
        store.verify()
    with pytest.raises(DamagedStoreError, match="is damaged in rows"):
        store.read("activations/h.0", 0, store.rows)
    file.unlink()
    with pytest.raises(DamagedStoreError, match=f"{array} is missing"):
        ActivationStore.open(store.path)
    make(tmp_path, "s")
    assert_same(tmp_path / "s", make(tmp_path, "t"))


def test_int8_stores_are_merged(tmp_path: Path) -> None:
    first, other = make(tmp_path, "1"), make(tmp_path, "2", seed=1)
    run_merge(str(tmp_path / "side"), [first, other])
    side = ActivationStore.open(str(tmp_path / "side"))
    side.verify()
    assert side.made_of("h.1") == ActivationStore.open(other).made_of("h.1")
    linked = [p for p in (tmp_path / "side").rglob("*") if p.is_file() and p.stat().st_nlink > 1]
    assert {p.relative_to(tmp_path / "side").parts[0] for p in linked} == {
        "activations", "scales", "tokens"
    }  # fmt: skip
    np.save(tmp_path / "x.npy", np.random.default_rng(5).standard_normal((700, 24)))
    run_import(str(tmp_path / "3"), [f"h.0={tmp_path}/x.npy"], ImportOptions("int8"))
    run_merge(str(tmp_path / "long"), [first, str(tmp_path / "3")])
    long = ActivationStore.open(str(tmp_path / "long"))
    long.verify()
    parts = [ActivationStore.open(p) for p in (first, str(tmp_path / "3"))]
    want = np.concatenate([p.read("activations/h.0", 0, p.rows) for p in parts])
    assert np.array_equal(long.read("activations/h.0", 0, 2200), want)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_in_int8(tmp_path: Path, value: float) -> None:
    x = np.ones((300, 4), np.float32)
    x[123, 2] = value
    np.save(tmp_path / "x.npy", x)
    with pytest.raises(UserError, match=rf"x\.npy has {value} in row 123, column 2"):
        run_import(str(tmp_path / "s"), [f"x={tmp_path}/x.npy"], ImportOptions("int8"))


def test_cache_writes_int8(tmp_path: Path) -> None:
    """The same rows as a float store's, but for half a step."""
    stores: dict[str, Any] = {}
    for dtype in ("float32", "int8"):
        data = config_data(tmp_path, dtype=dtype, store=str(tmp_path / dtype))
        run_cache(parse_config(data), Accelerator(cpu=True))
        stores[dtype] = ActivationStore.open(data["cache"]["store"])
        stores[dtype].verify()
        run_cache(parse_config(data), Accelerator(cpu=True))
    documents = {}
    for dtype, store in stores.items():
        tokens = [store.read(f"tokens/{n}", 0, store.rows) for n in ("document", "position")]
        order = np.lexsort(tokens)
        documents[dtype] = store.read("activations/model.layers.0", 0, store.rows)[order]
    x, rows = documents["float32"], documents["int8"]
    assert 0 < np.square(rows - x).sum() / np.square(x).sum() < 3e-4
