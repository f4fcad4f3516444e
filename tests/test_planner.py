"""The planner's figures beside real tensors, counted collectives and measured GPUs; what it finds,
refuses and prints.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from flash_sae_dist.activations import loader
from flash_sae_dist.activations.language_model import model_without_weights
from flash_sae_dist.activations.stream_order import BufferShape
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.grid import plan
from flash_sae_dist.kernels.encode_plan import FLAT_BYTES
from flash_sae_dist.launch.bench_wire import measure_sent
from flash_sae_dist.launch.cli import build
from flash_sae_dist.parallel.mesh import Mesh, end_groups, make_mesh
from flash_sae_dist.planner import caching, devices, memory, search, storage, timing, wire
from flash_sae_dist.planner.devices import GIB, GPUS, Launch
from flash_sae_dist.planner.memory import Work, memory_of_rank, work_of
from flash_sae_dist.training.engines import density
from flash_sae_dist.training.job import Config, parse_config, with_values
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.records import Job
from flash_sae_dist.training.step import SAETraining
from tests.tiny_model import config_data, write_config

ROOT = Path(__file__).parents[1]
CPU, META = torch.device("cpu"), torch.device("meta")


def config_of(n: int, f: int, k: int, **train: Any) -> Config:
    return parse_config(
        {
            "output": "runs/x",
            "sae": {"k": k, "d_sae": f},
            "train": {"num_tokens": 10**9, "batch_tokens": n, "hookpoint": "h", **train},
        }
    )


def work(n: int, d: int, f: int, k: int, *, on_gpu: bool = True, **train: Any) -> Work:
    return work_of("h", config_of(n, f, k, **train), d, "float32", on_gpu=on_gpu)


def launch(processes: int, hosts: int = 1, gib: float = 139.8) -> Launch:
    """H200s that the store never holds up."""
    return Launch(GPUS["H200"], processes, hosts, int(gib * GIB), store_gb_s=1000)


def training_of(config: Config, d: int, mesh: Mesh, device: torch.device) -> SAETraining:
    assert config.sae is not None
    assert config.train is not None
    return SAETraining(config.sae, config.train, d, mesh, device, rms=1.0, drawn=device != META)


def kept_tensors(training: SAETraining) -> int:
    """Bytes of all tensors that an engine keeps between two steps."""
    params = list(training.sae.parameters())
    found = [p.detach() for p in params] + [p.grad for p in params if p.grad is not None]
    for param in params:
        found += [t for name, t in training.optimizer.state[param].items() if name != "step"]
    found += getattr(training.optimizer, "copies", None) or ()
    found += [training.dead.tokens_since_fired, training.dead.slots]
    return sum(t.numel() * t.element_size() for t in found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moment_dtype": "bfloat16", "precision": "bfloat16"},
        {"ema_decay": 0.9, "precision": "bfloat16", "adam_mode": "lazy"},
        {"precision": "float64"},
        {"engine": "autograd"},
        {"engine": "autograd", "precision": "float64"},
    ],
    ids=str,
)
def test_what_an_engine_keeps_is_exact(options: dict[str, Any]) -> None:
    config = config_of(8, 96, 4, **options)
    training = training_of(config, 24, Mesh.single(), CPU)
    training.step(torch.randn(8, 24), PhaseTimer(CPU, enabled=False))
    planned = work_of("h", config, 24, "float32", on_gpu=False)
    assert kept_tensors(training) == sum(memory.kept_bytes(planned, 1).values())
    rows, whole, _ = training.state()
    state = sum(t.numel() * t.element_size() for t in [*rows.values(), *whole.values()])
    assert state == storage.checkpoint_bytes(planned)


def test_a_search_by_fp8_is_planned_with_its_copy_of_the_encoder() -> None:
    config = config_of(4096, 131_072, 64)
    assert config.sae is not None
    searched = config.model_copy(update={"sae": config.sae.model_copy(update={"search": "fp8"})})
    exact, fp8 = (
        sum(memory.step_bytes(work_of("h", c, 768, "float32", on_gpu=True), 1, 1, 0.0).values())
        for c in (config, searched)
    )
    copies = (131_072 + 4096) * 768
    assert copies < fp8 - exact < 1.2 * copies


def test_what_the_batch_rule_keeps_of_a_token_is_planned() -> None:
    flat = pytest.importorskip("flash_sae_dist.kernels.encode_flat")

    def kept(tokens: int) -> int:
        x, W = torch.zeros(tokens, 8), torch.zeros(16, 8)
        call = flat.Flat(x, W, W[:, 0], torch.zeros(()), 4, 4, "rows", None)
        made = {k: t for k, t in vars(call).items() if k not in ("x", "W_enc", "bias", "theta")}
        storages = [t.untyped_storage() for t in made.values() if isinstance(t, torch.Tensor)]
        return sum({s.data_ptr(): s.nbytes() for s in storages}.values())

    limit = 4
    assert 0.9 * FLAT_BYTES <= (kept(2000) - kept(1000)) / 1000 + limit <= FLAT_BYTES


@pytest.mark.parametrize(("optimizer", "each"), [("adam", 26), ("signum", 18)])
def test_bytes_that_a_step_moves_of_a_parameter(optimizer: str, each: int) -> None:
    one = work(4096, 768, 24576, 32, optimizer=optimizer)
    assert one.engine == "fused"
    assert timing._parameter_bytes(one, 1) == each * 2 * 768 * 24576


def test_steps_by_threshold_are_planned_dense_and_for_lists_that_are_not() -> None:
    """Lists are of as many latents as make a step dense; a dense step is of blocks."""
    data = config_of(4096, 4096, 8, precision="bfloat16").model_dump(exclude_unset=True)
    works = {}
    for name in ("topk", "batch_topk", "relu", "jumprelu", "gated"):
        k = {"k": 8} if name.endswith("topk") else {}
        config = parse_config(data | {"sae": {"architecture": name, "d_sae": 4096, **k}})
        works[name] = work_of("h", config, 64, "float32", on_gpu=True)
        if not k:
            assert works[name].most_slots(1) == -(-4096 * density.SHARES["cuda"][0] // 1)
            assert works[name].most_slots(4) == 21
            assert works[name].slots(1) == 64
    taken = {name: memory.step_bytes(one, 1, 1, 0) for name, one in works.items()}
    assert works["topk"].most_slots(1) == works["batch_topk"].most_slots(1) == 8
    # Both gradients, and pre-activations of all pairs: activations, masks, their gradients.
    for name in ("relu", "jumprelu", "gated"):
        assert taken[name]["dense step"] >= 4 * (2 * 4096 * 64 + 8 * 4096 * 4096)
    # Six keys for each pair beside what the token rule takes. The reference, on a CPU, has blocks
    # of pre-activations.
    keys = taken["batch_topk"]["encoder"] - taken["topk"]["encoder"]
    assert 8 * 6 * 4096 * 8 <= keys < 16 << 20
    on_cpu = memory.step_bytes(works["batch_topk"]._replace(on_gpu=False), 1, 1, 0)
    assert on_cpu["encoder"] >= 3 * 4 * 4096 * 4096
    several = memory.step_bytes(works["relu"], 4, 1, 0)
    assert sum(several.values()) < sum(taken["relu"].values()) / 3


def test_offload_by_deepspeed_fits_where_moments_do_not() -> None:
    """1e9 parameters: 4 GB of weights, 8 of moments. The store and the host hold all of them."""
    offload = str(ROOT / "configs" / "deepspeed" / "zero2_offload.json")
    shape, on = (1024, 4096, 122_880, 32), launch(1, gib=12)
    for engine in ("fused", "autograd", "deepspeed"):
        with pytest.raises(ConfigError, match="GiB free"):
            search.check_memory(work(*shape, engine=engine), 1, 1, on)
    one = work(*shape, engine="deepspeed", deepspeed_config=offload)
    search.check_memory(one, 1, 1, on)
    assert storage.host_bytes([one], 1, 1)["offloaded"] == 5 * storage.sae_bytes(one)
    assert storage.checkpoint_bytes(one) == storage.checkpoint_bytes(
        work(*shape, engine="autograd")
    )
    assert timing.compute_ms(one, on, 1, 1, 0) > timing.compute_ms(work(*shape), on, 1, 1, 0)


def test_zero_splits_what_replicas_would_all_keep() -> None:
    shape, zero2 = (1024, 4096, 122_880, 32), str(ROOT / "configs" / "deepspeed" / "zero2.json")
    autograd = work(*shape, engine="autograd")
    one, two = (work(*shape, engine="deepspeed", deepspeed_config=f) for f in (None, zero2))
    kept = [sum(memory_of_rank(w, 2, 4).kept.values()) for w in (autograd, one, two)]
    assert kept == sorted(kept, reverse=True)
    # Weights and gradients; a quarter of the master weights and of both moments.
    weights = storage.sae_bytes(one) // 2
    assert kept[1] == pytest.approx((2 + 3 / 4) * weights, rel=0.01)
    assert kept[2] == pytest.approx((1 + 4 / 4) * weights, rel=0.01)


# MiB of a step above what it keeps, with none, a tenth and a third of the latents dead, and ms of
# the same steps and of nine tenths: docs/performance.md, one H200.
MEASURED = {
    (1024, 4096, 65536, 64): ((98, 380, 1187), (4.452, 5.081, 6.490)),
    (4096, 768, 24576, 32): ((55, 96, 234), (0.641, 0.888, 1.283)),
    (8192, 4096, 131072, 64): ((278, 1378, 3858), (21.05, 28.01, 45.56)),
    (4096, 4096, 32768, 50): ((200, 376, 872), (4.327, 5.259, 7.343)),
    (2048, 3584, 16384, 60): ((122, 156, 349), (1.711, 1.986, 2.551)),
    (4096, 2304, 16384, 100): ((120, 172, 338), (2.397, 2.774, 3.477)),
}


@pytest.mark.parametrize("shape", MEASURED, ids=str)
def test_steps_on_one_gpu_are_as_measured(shape: tuple[int, int, int, int]) -> None:
    mib, ms = MEASURED[shape]
    one, kept = work(*shape), sum(memory.kept_bytes(work(*shape), 1).values())
    for share, taken, took in zip((0, 0.1, 1 / 3), mib, ms, strict=True):
        planned = sum(memory.step_bytes(one, 1, 1, share).values())
        assert (kept + planned) / (kept + taken * 2**20) == pytest.approx(1, abs=0.1)
        time = timing.compute_ms(one, launch(1), 1, 1, share)
        assert time == pytest.approx(took, rel=0.06), share


# Peak GiB and ms on one H200, as two shards and as two replicas: docs/performance.md.
SEVERAL = {
    (4096, 768, 24576, 32): ((0.68, 0.43, 0.67), (0.669, 0.667)),
    (1024, 4096, 65536, 64): ((7.2, 3.7, 7.2), (2.636, 4.233)),
    (8192, 4096, 131072, 64): ((14.8, 7.8, 14.5), (13.07, 15.72)),
    (8192, 2304, 1048576, 64): ((63.5, 32.0), (49.12,)),
}


@pytest.mark.parametrize("shape", SEVERAL, ids=str)
def test_two_gpus_are_as_measured(shape: tuple[int, int, int, int]) -> None:
    gib, ms = SEVERAL[shape]
    for (p, r), peak in zip(((1, 1), (2, 1), (1, 2)), gib, strict=False):
        assert memory_of_rank(work(*shape), p, r).peak / GIB == pytest.approx(peak, rel=0.1)
    for (p, r), took in zip(((2, 1), (1, 2)), ms, strict=False):
        time = timing.step_time(work(*shape), launch(2), p, r, dead=0)
        assert time.compute + time.wire == pytest.approx(took, rel=0.16)


@contextmanager
def world_of(size: int, rank: int) -> Iterator[None]:
    """A launch of so many processes, of which this is the only one: what the others would send is
    what it sends itself."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield
    finally:
        end_groups()


class Simulated(NamedTuple):
    sent: list[tuple[str, int, int]]  # what, calls, bytes
    planned: list[wire.Sent]
    training: SAETraining


def simulate(p: int, r: int, dead: int, architecture: str = "topk", **train: Any) -> Simulated:
    """A step of one rank of a P x R mesh at a small shape, its collectives counted."""
    d, f, n = 32, 64, 4
    config = config_of(n * r, f * p, 8, dead_after_tokens=n * r, k_aux=9, **train)
    config = with_values(config, {"sae.architecture": architecture})
    with world_of(p * r, p * r * 5 // 7):
        training = training_of(config, d, make_mesh(p, r, device=CPU), CPU)
        if dead:
            training.dead.tokens_since_fired[:dead] = 10**12
            training.step_index = 100
        timer, x = PhaseTimer(CPU, enabled=False), torch.randn(n, d)
        training.step(x, timer)
        sent = measure_sent(lambda: training.step(x, timer), CPU, 1)
    planned = wire.step_sent(work_of("h", config, d, "float32", on_gpu=False), p, r, dead)
    counted = [(c.what, round(c.calls), round(c.bytes)) for c in sent.collectives]
    return Simulated(counted, planned, training)


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize(
    ("p", "r", "train"),
    [
        (64, 1, {"grad_clip": 1.0, "micro_batches": 2}),
        (1, 64, {"grad_clip": 1.0, "micro_batches": 2}),
        (8, 8, {"precision": "float64"}),
        (64, 16, {}),
        (32, 32, {"dead_latents": "ghost"}),
        (64, 1, {"engine": "autograd", "grad_clip": 1.0, "micro_batches": 2}),
        (64, 16, {"engine": "autograd"}),
        (2, 3, {"architecture": "batch_topk", "grad_clip": 1.0, "micro_batches": 2}),
        (1, 16, {"architecture": "batch_topk", "precision": "float64"}),
        (2, 3, {"architecture": "batch_topk", "engine": "autograd", "micro_batches": 2}),
        (2, 3, {"architecture": "matryoshka", "micro_batches": 2}),
        (2, 3, {"architecture": "matryoshka", "engine": "autograd", "micro_batches": 2}),
        (2, 3, {"architecture": "multi_topk"}),
        (2, 3, {"architecture": "multi_topk", "engine": "autograd"}),
    ],
    ids=str,
)
def test_collectives_of_64_and_1024_processes(p: int, r: int, train: dict[str, Any]) -> None:
    for dead in (0, 20):
        found = simulate(p, r, dead, **train)
        local = found.training.sae.W_enc.shape
        assert local == (64, 32)
        assert found.training.sae.first_latent == found.training.mesh.shard * 64
        assert sum(c[2] for c in found.sent) == sum(sent.bytes for sent in found.planned)
        assert sum(c[1] for c in found.sent) == sum(sent.calls for sent in found.planned)


def test_no_gradient_of_a_whole_matrix_is_sent_by_the_fused_engine() -> None:
    """However many processes there are: what a rank sends does not grow with the latents."""
    for p, r in ((64, 1), (64, 16)):
        few, many = (work(8192, 4096, f, 64) for f in (2**20, 2**24))
        assert wire.step_sent(few, p, r) == wire.step_sent(many, p, r)
        assert sum(sent.bytes for sent in wire.step_sent(many, p, r)) < 300e6


@pytest.mark.filterwarnings("ignore:Set timeout is now only supported")
@pytest.mark.parametrize(
    ("world", "p", "f", "options"),
    [
        (8, 8, 2**20, {}),
        (64, 64, 2**24, {"moment_dtype": "bfloat16"}),
        (1024, 64, 2**24, {"ema_decay": 0.999}),
        (1024, 512, 2**27, {}),
    ],
)
def test_shards_of_a_large_launch(world: int, p: int, f: int, options: dict[str, Any]) -> None:
    """Shapes and memory of a rank whose tensors have no storage."""
    config = config_of(8192, f, 64, precision="bfloat16", **options)
    with world_of(world, world - 1):
        mesh = make_mesh(p, world // p, device=META)
        assert (mesh.shard, mesh.replica) == (p - 1, world // p - 1)
        training = training_of(config, 4096, mesh, META)
    assert training.sae.W_dec.shape == (f // p, 4096)
    planned = work_of("h", config, 4096, "bfloat16", on_gpu=True)
    assert kept_tensors(training) == sum(memory.kept_bytes(planned, p).values())


def test_a_process_reads_its_part_of_a_batch() -> None:
    (gather,) = wire.batch_sent(work(8192, 4096, 2**20, 64), 8, 2)
    assert gather.bytes == 8192 * 4096 * 4 // 16
    assert wire.batch_sent(work(8192, 4096, 2**20, 64), 1, 16) == []


def test_the_loaders_ring_is_the_loaders() -> None:
    assert storage.LOADER_BYTES == loader._RING_BYTES


def best(processes: int, hosts: int, gib: float, grid: int = 0, **sae: Any) -> tuple[int, int]:
    """What auto finds for an SAE, or for a grid of so many, at width 4096."""
    n, f = sae.pop("n", 8192), sae.pop("f", 131072)
    config = config_of(n, f, 64, num_shards="auto", **sae)
    jobs = [Job(f"h/{i}", Path("x"), config) for i in range(max(1, grid))]
    here = launch(processes, hosts, gib)
    works = plan.works_of(jobs, {"h": 4096}, "bfloat16", here)
    return plan.choose_mesh(jobs, works, here, grid=bool(grid))


def test_auto_finds_the_mesh_that_fits_and_is_fastest() -> None:
    assert best(1, 1, 139) == (1, 1)
    assert best(2, 1, 139) == (2, 1), "0.57 beside 0.68 of one GPU: docs/performance.md"
    assert best(8, 1, 16, f=2**20) == (8, 1), "nothing else fits"
    assert best(8, 1, 139, grid=8) == (1, 1), "a GPU each"
    assert best(8, 1, 16, f=2**20, grid=2) == (8, 1)
    assert best(64, 8, 139, f=2**24) == (64, 1)
    assert best(64, 8, 139, n=65536, f=16384, dead_latents="none")[0] <= 8, "shards of one host"


def test_auto_keeps_replicas_that_are_asked_for() -> None:
    assert best(8, 1, 139, num_replicas=4) == (2, 4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"processes": 8, "gib": 4, "f": 2**20}, "over train.num_shards=8 takes"),
        ({"processes": 7}, "no shards x replicas of 7 processes divide"),
    ],
)
def test_auto_refuses_what_fits_on_no_mesh(options: dict[str, Any], words: str) -> None:
    given = {"processes": 1, "hosts": 1, "gib": 139} | options
    with pytest.raises(ConfigError, match=words):
        best(given.pop("processes"), given.pop("hosts"), given.pop("gib"), **given)


@pytest.mark.parametrize(
    ("gib", "options", "cures"),
    [
        (20, {}, ["train.moment_dtype=bfloat16", "train.num_shards=2 with 2 processes", "d_sae="]),
        (11, {"moment_dtype": "bfloat16"}, ["train.num_shards=2", "sae.d_sae="]),
        (4, {"f": 4096, "n": 2**18}, ["train.batch_tokens="]),
        (0.01, {}, ["lower sae.d_sae and train.batch_tokens"]),
    ],
)
def test_what_does_not_fit_is_refused_with_a_cure(
    gib: float, options: dict[str, Any], cures: list[str]
) -> None:
    n, f = options.pop("n", 8192), options.pop("f", 200_000)
    one = work(n, 4096, f, 64, **options)
    with pytest.raises(ConfigError) as e:
        search.check_memory(one, 1, 1, launch(1, 1, gib))
    told = str(e.value)
    assert "\n" not in told
    assert f"sae.d_sae={f} at width 4096" in told
    assert f"but the H200 has {gib:.1f} GiB free" in told
    for cure in cures:
        assert cure in told


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([64, 4096, 2**17]),
    f=st.integers(256, 2**22),
    gib=st.sampled_from([0.5, 4, 40]),
    engine=st.sampled_from(["auto", "autograd"]),
    r=st.sampled_from([1, 4]),
)
def test_every_change_that_is_named_is_enough(
    n: int, f: int, gib: float, engine: str, r: int
) -> None:
    one, limit = work(n, 1024, f, 64, engine=engine), int(gib * GIB)
    if search.fits(one, 1, r, limit):
        search.check_memory(one, 1, r, launch(r, 1, gib))
        return
    with pytest.raises(ConfigError) as e:
        search.check_memory(one, 1, r, launch(r, 1, gib))
    for change in filter(None, str(e.value).partition("; set ")[2].split(", or ")):
        key, _, value = change.partition("=")
        section, _, name = key.partition(".")
        if name == "num_shards":
            assert search.fits(one, int(value.split()[0]), r, limit), change
        elif section == "sae":
            assert search.fits(one._replace(d_sae=int(value)), 1, r, limit), change
        else:
            new = value if name == "moment_dtype" else int(value)
            train = one.train.model_copy(update={name: new})
            assert search.fits(one._replace(train=train), 1, r, limit), change


def test_more_processes_are_no_cure_where_they_share_a_hosts_memory() -> None:
    one = work(64, 4096, 200_000, 64, on_gpu=False)
    with pytest.raises(ConfigError, match=r"its share of this host has 8\.0 GiB free; set ") as e:
        search.check_memory(one, 1, 1, Launch(devices.CPU, 1, 1, 8 * GIB))
    assert "processes an SAE" not in str(e.value)


def test_what_fits_is_not_refused() -> None:
    search.check_memory(work(8192, 2304, 2**20, 64), 1, 1, launch(1, 1, 63.5))


def test_a_grid_uses_every_group() -> None:
    """One hookpoint's SAEs, which one GPU could hold together, are dealt out."""
    config = config_of(4096, 24576, 32)
    jobs = [Job(f"h/{i}", Path("x"), config) for i in range(20)]
    for processes, rounds in ((1, 20), (4, 5), (20, 1), (64, 1)):
        here = launch(processes)
        works = plan.works_of(jobs, {"h": 768}, "bfloat16", here)
        groups = plan.place(jobs, works, here, 1, 1)
        assert len(groups) == processes
        placed = [job.name for group in groups for b in group for job in b.jobs]
        assert sorted(placed) == sorted(job.name for job in jobs)
        assert max(sum(len(b.jobs) for b in group) for group in groups) == rounds
        assert sum(len(group) > 0 for group in groups) == min(20, processes)


# The verb.

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plan")
    return write_config(root / "c.yaml", config_data(root))


def planned(file: Path, *args: str) -> Any:
    return RUNNER.invoke(build(), ["plan", str(file), *args])


def test_the_page_fits_100_columns_and_names_all(file: Path) -> None:
    result = planned(file, "--processes", "16", "--hosts", "2", "train.num_shards=auto")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.output.splitlines())) <= 100
    for word in (
        "16 processes on 2 hosts, H200",
        "not measurements",
        "no GPU is here",
        "store ",
        "train 4 SAEs: 1 shard x 1 replica (the fastest that fits)",
        "kept a rank",
        "host memory",
        "disk ",
        "over the bus",
        "time ",
        "which group trains what",
        "peak",
    ):
        assert word in result.output, word
    assert result.output.rstrip().endswith("fits")


def test_processes_are_the_configs_where_no_gpu_is(file: Path) -> None:
    result = planned(file, "grid=null", "train.num_shards=4", "train.num_replicas=2")
    assert "plan of" in result.output
    if not torch.cuda.is_available():
        assert "8 processes, H200" in result.output


def test_json_holds_the_same(file: Path) -> None:
    result = planned(file, "--json", "--gpu", "h100", "--processes", "2")
    told = json.loads(result.output)
    assert told["fits"]
    assert told["launch"]["gpu"]["name"] == "H100"
    assert told["store"]["widths"] == {"model.layers.0": 16, "model.layers.1.mlp": 16}
    assert told["cache"]["model"]["flops"] > 0
    assert told["cache"]["left_out"] == ""
    assert told["train"]["num_shards"] == 2
    (small, large) = told["train"]["jobs"]
    assert (small["k"], large["k"]) == (2, 4)
    assert large["memory"]["peak"] >= sum(large["memory"]["kept"].values())
    assert {sent["group"] for sent in large["sent"]} == {"shards"}
    names = [name for group in told["train"]["groups"] for b in group for name in b["jobs"]]
    assert len(names) == 4


def test_a_config_that_does_not_fit_ends_with_a_cure(file: Path) -> None:
    result = planned(file, "--gpu", "L40S", "grid.values={}", "sae.d_sae=500000000")
    assert result.exit_code == 2
    assert "does not fit: " in result.output
    assert "error: " in result.output
    assert "set " in result.output.splitlines()[-1]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--gpu", "H2000"), "--gpu H2000 is not in the planner's table; did you mean 'H200'"),
        (("--processes", "6", "--hosts", "4"), "--processes 6 cannot be split over --hosts 4"),
        (
            ("--processes", "8", "grid=null", "train.num_shards=4"),
            "set --processes 4",
        ),
        (("model.name=no/such-model-at-all",), "--width D plans without the model"),
        (
            ("model.name=no/such-model-at-all", "--width", "64", "cache.hookpoints=[layers.*]"),
            "'layers.*' is a pattern: without the model's config, write the names out",
        ),
        (("store=nowhere.zarr",), "store='nowhere.zarr' is no activation store"),
    ],
)
def test_mistakes_are_told_in_a_sentence(file: Path, args: tuple[str, ...], words: str) -> None:
    result = planned(file, *args)
    assert result.exit_code == 2, result.output
    assert words in result.output
    assert "Traceback" not in result.output


def test_a_width_stands_in_for_the_model(file: Path) -> None:
    result = planned(file, "--width", "64", "model.name=no/such-model-at-all")
    assert result.exit_code == 0, result.output
    assert "left out " in result.output
    assert "width 64, " in result.output


STREAM = ("train.source=stream", "train.buffer_tokens=1000", "grid=null")


def test_a_stream_is_planned(file: Path) -> None:
    """The model and its rows stand beside the SAE; its passes take their time of the same GPU."""
    result = planned(file, "--gpu", "H200", *STREAM, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["store"] is None
    (job,) = found["train"]["jobs"]
    cfg = parse_config(config_data(file.parent)).cache
    assert cfg is not None
    shape = BufferShape.of(1000, cfg.batch_sequences, cfg.context_length)
    model = job["memory"]["model"]
    assert model["train.buffer_tokens"] == shape.rows * 16 * 4
    assert model["model"] == 4 * found["stream"]["model"]["parameters"]
    taken = sum(sum(job["memory"][part].values()) for part in ("kept", "step", "feed", "model"))
    assert job["memory"]["peak"] == taken
    times = job["step_ms"]
    assert times["loader"] == 0 < times["model"]
    assert times["all"] == pytest.approx(times["compute"] + times["model"])
    assert job["to_device"] == 0
    page = planned(file, "--gpu", "H200", *STREAM).output
    assert "stream: the model runs beside the steps, 2 hookpoints, float32" in page
    assert "forward passes" in page


def test_a_stream_without_its_model_is_planned_by_its_width(file: Path) -> None:
    gone = "model.name=no/such-model-at-all"
    result = planned(file, *STREAM, gone)
    assert result.exit_code == 2
    assert "--width D plans without the model" in result.output
    result = planned(file, *STREAM, gone, "--width", "64")
    assert result.exit_code == 0, result.output
    assert "the model's memory and time are left out" in " ".join(result.output.split())


def test_a_buffer_that_does_not_fit_is_refused(file: Path) -> None:
    large = ("train.buffer_tokens=10_000_000_000", "train.batch_tokens=64")
    result = planned(file, "--gpu", "H200", *STREAM[::2], *large)
    assert result.exit_code == 2, result.output
    assert "139.8 GiB free" in " ".join(result.output.split())


LAYERS = ",".join(f"model.layers.{i}" for i in range(26))
GRID = "grid.values={sae.d_sae: [16384, 32768, 65536, 131072], sae.k: [16, 32, 64, 128, 256]}"
LARGE = {
    "llama-3.1-8b-wide 8": ["--width", "4096", "sae.d_sae=1_048_576"],
    "llama-3.1-8b-wide 64": [
        *("--hosts", "8", "--width", "4096", "sae.d_sae=16_777_216", "train.num_shards=auto"),
    ],
    "gemma-2-2b-grid 64": [
        *("--hosts", "8", "--width", "2304", f"cache.hookpoints=[{LAYERS}]", GRID),
        "train.num_shards=auto",
    ],
}


@pytest.mark.parametrize("case", LARGE)
def test_the_page_of_large_jobs_holds_what_is_printed(case: str) -> None:
    name, processes = case.split()
    given = [*LARGE[case], "--gpu", "H200", "--processes", processes, "model.name=no/model"]
    result = planned(ROOT / "configs" / f"{name}.yaml", *given)
    assert result.exit_code == 0, result.output
    train = result.output[result.output.index("\ntrain ") :].strip()
    assert train in (ROOT / "docs" / "scale.md").read_text()


def test_the_models_shape_is_its_own(file: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    config = parse_config(config_data(file.parent))
    shape = caching.model_shape(config)
    assert config.model is not None
    with FakeTensorMode():
        parameters = list(model_without_weights(config.model).model.parameters())
    assert shape.parameters == sum(p.numel() for p in parameters)
    assert shape.widths == {"model.layers.0": 16, "model.layers.1.mlp": 16}
    # Two of three blocks: products of 16 x 16 and 16 x 32, attention over 24 tokens.
    block = 2 * (4 * 16 * 16 + 3 * 16 * 32) + 2 * 2 * 24 * 16
    assert shape.flops == pytest.approx(2 * block, rel=0.05)


def test_caching_is_refused_before_work(
    file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = parse_config(config_data(file.parent))
    monkeypatch.setattr(caching, "free_bytes", lambda: 1000)
    with pytest.raises(ConfigError, match=r"cache\.memory_gib=8: 1 process a host take"):
        caching.check_launch(config, CPU, 1)
    tight = Launch(GPUS["A100"], 1, 1, 1000)
    with pytest.raises(ConfigError, match=r"model\.name=.* takes .*, but the A100 has 0\.0 GiB"):
        caching.check_cache(caching.cache_plan(config, tight), config, tight, None)
    large = Launch(GPUS["A100"], 1, 1, 8 * GIB)
    takes = caching.cache_plan(config, large)
    takes.device.update({"model": 5 * GIB, "shards that are filled": 6 * GIB})
    with pytest.raises(
        ConfigError, match=r"set model\.dtype=bfloat16, or cache\.memory_gib=3, or "
    ):
        caching.check_cache(takes, config, large, None)
    # A model whose config is nowhere is left to the job itself.
    data = config_data(file.parent) | {"model": {"name": "no/such-model-at-all"}}
    caching.check_launch(parse_config(data), CPU, 1)


def test_training_is_refused_before_work(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` and `grid` ask the same check, with what the processes have."""
    monkeypatch.setattr(plan, "memory_of", lambda device: 10_000)
    shape = caching.rows_to_be(
        parse_config(config_data(file.parent)).cache,
        {"model.layers.0": 16},  # type: ignore[arg-type]
    ).shape

    class Store:
        where = "the store"
        hookpoints, widths, dtype = ["model.layers.0"], shape.widths, "float32"

    store: Any = Store()
    monkeypatch.setattr(plan, "check_same_job", lambda *_: None)
    config = parse_config(config_data(file.parent))
    for grid in (False, True):
        with pytest.raises(
            ConfigError, match="takes 0.0 GiB of a process's memory .*; lower sae.d_"
        ):
            plan.agreed_plan(config, store, Mesh.single(), CPU, grid=grid)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"moment_dtype": "bfloat16"}, {"engine": "autograd"}, {"grad_clip": 1.0}],
    ids=str,
)
@pytest.mark.parametrize("dead", [0.0, 0.1])
def test_a_gpus_peak_is_the_predicted_one(options: dict[str, Any], dead: float) -> None:
    """A whole run's first steps, eager and captured, as the loader would feed them: within 15%."""
    device, n, d, f = torch.device("cuda", torch.cuda.current_device()), 4096, 2048, 65536
    config = config_of(n, f, 64, dead_after_tokens=n, **options)
    before = torch.cuda.memory_allocated(device)
    training = training_of(config, d, Mesh.single(), device)
    if dead:
        training.dead.tokens_since_fired[: int(dead * f)] = 10**12
    training.step_index = 100 if dead else 1
    batches = [torch.randn(n, d, device=device, dtype=torch.bfloat16) for _ in range(4)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats(device)
    for step in range(6):
        training.step(batches[step % 4], PhaseTimer(device, enabled=False))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    planned = memory_of_rank(work_of("h", config, d, "bfloat16", on_gpu=True), 1, 1, dead=dead)
    assert planned.peak == pytest.approx(peak, rel=0.1)


@pytest.mark.parametrize(
    "device", [CPU, pytest.param(torch.device("cuda"), marks=pytest.mark.gpu)], ids=str
)
def test_weights_that_are_not_finite_are_found_in_no_more_memory(device: torch.device) -> None:
    """Before each checkpoint of a run that has no more to spare."""
    training = training_of(config_of(64, 4096, 8), 256, Mesh.single(), device)
    assert training.is_finite()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        assert training.is_finite()
        assert torch.cuda.max_memory_allocated(device) - before < training.sae.W_enc.nbytes / 8
    for name, weight in training.sae.named_parameters():
        for value in (torch.nan, torch.inf, -torch.inf):
            kept = weight.detach().clone()
            weight.data.view(-1)[len(weight) // 3] = value
            assert not training.is_finite(), (name, value)
            weight.data.copy_(kept)


@pytest.mark.gpu
def test_the_gpu_that_is_here_is_planned_for() -> None:
    here = devices.launch_for(None, None, 1)
    assert here.is_here
    assert here.processes == torch.cuda.device_count()
    assert here.memory <= torch.cuda.get_device_properties(0).total_memory


def test_auto_asks_no_memory_for_what_is_finished() -> None:
    small, large = work(4096, 768, 24576, 32), work(8192, 4096, 2**20, 64)
    jobs = [Job(name, Path(name), config_of(4096, 24576, 32)) for name in ("small", "large")]
    works, here = {"small": small, "large": large}, launch(2, 1, 8)
    with pytest.raises(ConfigError, match="GiB"):
        plan.choose_mesh(jobs, works, here, grid=True)
    found = plan.choose_mesh(jobs, works, here, grid=True, finished={"large"})
    assert found in plan.meshes(2, None, several_groups=True)


def test_auto_gives_deepspeed_all_processes() -> None:
    jobs = [Job(str(n), Path(str(n)), config_of(4096, 24576, 32)) for n in range(8)]
    works = {job.name: work(4096, 768, 24576, 32)._replace(engine="deepspeed") for job in jobs}
    shards, replicas = plan.choose_mesh(jobs, works, launch(8, 1, 80), grid=True)
    assert shards * replicas == 8


def test_a_change_that_the_grid_varies_is_no_cure() -> None:
    one = work(8192, 4096, 200_000, 64)
    with pytest.raises(ConfigError) as e:
        search.check_memory(one, 1, 1, launch(1, 1, 20), {"sae.d_sae", "train.moment_dtype"})
    assert "sae.d_sae=200000 at width" in str(e.value)
    assert "moment_dtype" not in str(e.value)
    assert "or sae.d_sae=" not in str(e.value)


def test_gh200_is_no_h200(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = type("Properties", (), {"total_memory": 96 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for called, known in (("NVIDIA H200", True), ("NVIDIA GH200 480GB", False),
                          ("NVIDIA A100-SXM4-80GB", True)):  # fmt: skip
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=called: name)
        assert (devices.gpu_of(torch.device("cuda", 0))[1] == "") == known
