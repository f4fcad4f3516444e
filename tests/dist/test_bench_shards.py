"""`bench shards` on CPUs: losses agree, and what is sent is what the design says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sae_dist.launch.bench_shards import _Place, difference, formula_bytes
from flash_sae_dist.launch.bench_wire import measure_sent
from tests.dist.ranks import free_port, rank_env, start_module, wait

Rows = dict[str, dict[str, Any]]


def bench(world: int, folder: Path, *options: str) -> tuple[Rows, str]:
    """Rows by place, and what was printed, of processes as accelerate launch starts them."""
    port, out = free_port(), folder / "rows.json"
    args = ["--cpu", "--steps", "2", "--blocks", "2", "--json", str(out), *options]
    module = "flash_sae_dist.launch.bench_shards"
    processes = [
        start_module(module, args, rank_env(rank, world, port), folder / f"{rank}.log")
        for rank in range(world)
    ]
    codes = wait(processes, 120)
    assert codes == [0] * world, "\n".join(p.text() for p in processes)[-4000:]
    rows = {row["where"]: row for row in json.loads(out.read_text())["rows"]}
    return rows, processes[0].out.read_text()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, str]:
    return bench(2, tmp_path_factory.mktemp("two"))


def test_two_processes_beside_one(two: tuple[Rows, str]) -> None:
    rows, printed = two
    assert list(rows) == ["one process", "2 shards", "2 replicas"]
    for place, row in rows.items():
        assert row["ms"] > 0
        assert row["x one"] == pytest.approx(row["ms"] / rows["one process"]["ms"])
        assert row["compute"] + row["wire"] == pytest.approx(row["eager"])
        if place != "one process":
            assert float(row["losses"]) < 1e-9
            assert f"tiny, {place}: " in printed
    assert rows["one process"]["sent MB"] == 0
    assert "Collectives of an eager step: tiny" in printed


def test_latents_may_grow_with_the_shards(tmp_path: Path) -> None:
    """What is sent does not: it is the tokens' candidates and reconstructions."""
    rows, _ = bench(2, tmp_path, "--weak", "--mesh", "1x2")
    assert list(rows) == ["one process", "2 shards"]
    assert rows["2 shards"]["diff %"] == 0
    assert "losses" not in rows["2 shards"], "of another SAE than one process's"


def test_shards_send_what_the_formula_says(two: tuple[Rows, str]) -> None:
    assert two[0]["2 shards"]["diff %"] == 0


def test_replicas_send_what_the_formula_says(two: tuple[Rows, str]) -> None:
    assert two[0]["2 replicas"]["diff %"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "places"),
    [
        (1, ["one process"]),
        (4, ["one process", "4 shards", "4 replicas", "2 replicas x 2 shards"]),
    ],
)
def test_dead_latents_on_other_numbers_of_processes(
    world: int, places: list[str], tmp_path: Path
) -> None:
    rows, _ = bench(world, tmp_path, "--dead", "0.2")
    assert list(rows) == places
    for row in rows.values():
        assert "remark" not in row
        assert float(row.get("losses", 0)) < 1e-9
        assert row.get("diff %", 0) == 0


def test_formula() -> None:
    # wide: candidates and sums of two shards, pairs of two replicas.
    wide = (8192, 4096, 131072, 64)
    assert formula_bytes(wide, _Place(1, 1), 0, False) == 0
    b_dec = 4 * 4096 + 4
    shards = 8192 * 64 * 8 + 8192 * 4096 * 4 + b_dec
    assert formula_bytes(wide, _Place(1, 2), 0, False) == shards
    pairs = 8192 / 2 * (64 * 12 + 4 * 4096) + b_dec + 16
    assert formula_bytes(wide, _Place(2, 1), 0, False) == pairs
    dead = formula_bytes(wide, _Place(2, 1), 0.1, False) - pairs
    padded = 13312  # of 13107 dead latents
    assert dead == 8 * padded * 4096 + 4 * padded + b_dec


def test_difference_of_losses() -> None:
    assert difference([1.0, 0.0], [1.0, 0.0]) == 0
    assert difference([1.0, 2.2], [1.0, 2.0]) == pytest.approx(0.1)
    assert difference([1.0, float("nan")], [1.0, 2.0]) == float("inf")


def test_collectives_are_counted_whatever_name_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_sae_dist.parallel import mesh

    calls = []

    def all_gather_into_tensor(out: torch.Tensor, given: torch.Tensor) -> None:
        calls.append((out, given))

    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", all_gather_into_tensor)
    monkeypatch.setattr(mesh, "own_name", all_gather_into_tensor, raising=False)
    x = torch.zeros(3, 5)

    def step() -> None:
        mesh.own_name(x, x[:2])  # type: ignore[attr-defined]

    sent = measure_sent(step, torch.device("cpu"), 3)
    assert mesh.own_name is all_gather_into_tensor, "names are put back"  # type: ignore[attr-defined]
    assert len(calls) == 3
    (found,) = sent.collectives
    assert (found.what, found.calls, found.bytes) == (
        "all_gather_into_tensor float32[2, 5]",
        1,
        2 * 5 * 4,
    )
    assert sent.bytes == found.bytes
