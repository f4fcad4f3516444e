"""Worker: trains SAEs by the deepspeed engine and others on one mesh, and returns losses and what
holds behind each step.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.train import ENGINES
from flash_sae_dist.launch.bench_wire import measure_sent
from flash_sae_dist.models.topk import TopKConfig
from flash_sae_dist.parallel.collectives import all_gather
from flash_sae_dist.parallel.mesh import Mesh, make_mesh
from flash_sae_dist.planner.devices import GIB, launch_here, memory_of
from flash_sae_dist.planner.memory import memory_of_rank, work_of
from flash_sae_dist.planner.search import check_memory
from flash_sae_dist.planner.timing import step_time
from flash_sae_dist.planner.wire import step_sent
from flash_sae_dist.training import checkpoint
from flash_sae_dist.training.checkpoint_writer import CheckpointWriter
from flash_sae_dist.training.host_memory import HostShare
from flash_sae_dist.training.job import parse_config
from flash_sae_dist.training.metrics import PhaseTimer
from flash_sae_dist.training.step import SAETraining
from tests.dist.ranks import ROOT, worker
from tests.dist.train_worker import BATCH, D_IN, D_SAE, DEVICE, K, batch

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"dead_latents": "none"},
    "free": {"micro_batches": 2, "k_aux": 2},
    # Of the gradients' norms, 1 to 4, some are clipped.
    "all": {"grad_clip": 2.0, "micro_batches": 2, "k_aux": 2},
    "bfloat16": {"precision": "bfloat16"},
    "resample": {"dead_latents": "resample", "dead_after_tokens": 3 * BATCH},
}
FOLDERS = [ROOT / "configs" / "deepspeed"]
KEPT, AFTER = 5, 5  # steps before a checkpoint and behind it


def make(kind: str, mesh: Mesh, option: str = "all") -> SAETraining:
    """A training of an engine, or of the deepspeed engine with a file of FOLDERS."""
    own: dict[str, Any] = {"engine": kind}
    for file in (folder / f"{kind}.json" for folder in FOLDERS):
        if file.exists():
            own = {"engine": "deepspeed", "deepspeed_config": str(file)}
    cfg = ENGINES[own["engine"]](
        **{"dead_after_tokens": 10**9} | own | OPTIONS[option],
        num_tokens=200 * BATCH,
        batch_tokens=BATCH,
        lr=3e-3,
        warmup_steps=10,
        encoder_scale="unit",  # whose gradients are as long as clipping asks for
        num_replicas=mesh.num_replicas,
        seed=3,
    )
    return SAETraining(TopKConfig(k=K, d_sae=D_SAE), cfg, D_IN, mesh, DEVICE)


def advance(training: SAETraining, until: int) -> list[list[float]]:
    """The losses of the steps that lead to one."""
    mesh, losses = training.mesh, []
    rows = BATCH // mesh.num_replicas
    while training.step_index < until:
        kind, dead = training.cfg.dead_latents, training.dead
        if (training.step_index, kind) in ((1, "auxk"), (3, "resample")):
            dead.tokens_since_fired[::4] = 2 * 10**9
        if (training.step_index, kind) == (1, "auxk"):
            # The next look at who is dead is 99 steps ahead.
            dead.list_(dead.mask())
        x = batch(training.step_index, training.master_dtype)
        mine = x[mesh.replica * rows : (mesh.replica + 1) * rows]
        metrics = training.step(mine, PhaseTimer(DEVICE, enabled=False))
        losses.append([float(m) for m in metrics])
    return losses


def master_copy(training: SAETraining) -> torch.Tensor:
    """W_dec as ZeRO's flat partitions have it, put together from all replicas' by hand."""
    sae, mesh, engine = training.sae, training.mesh, training.engine
    flat = engine.zero.optimizer.single_partition_of_fp32_groups[0]  # type: ignore[attr-defined]
    whole = all_gather(flat.detach(), mesh.replica_group, mesh.num_replicas).flatten()
    # The first group has W_enc and W_dec.
    size = sae.W_dec.numel()
    return whole[size : 2 * size].view_as(sae.W_dec)


def train(kind: str, option: str, steps: int, mesh: Mesh) -> dict[str, Any]:
    """Losses; how far decoder rows were from unit norm at worst; whether the replicas were equal
    and the master copy was the weights' after each step; how many latents were on the list.
    """
    training = make(kind, mesh, option)
    losses, off, same = [], 0.0, True
    for step in range(1, steps + 1):
        losses += advance(training, step)
        weights = [training.sae.W_dec.detach()]
        if hasattr(training.engine, "zero"):
            weights.append(master_copy(training))
        off = max(off, *(float((w.norm(dim=1) - 1).abs().max()) for w in weights))
        everyone = all_gather(weights[0], mesh.replica_group, mesh.num_replicas)
        same &= all(torch.equal(weights[0], w) for w in (*everyone, *weights))
    losses_ = torch.tensor(losses, dtype=torch.float64)
    found = {"losses": losses_, "off": off, "same": same, "listed": training.dead.num_listed}
    return found | (planned(training, steps) if hasattr(training.engine, "zero") else {})


def planned(training: SAETraining, steps: int) -> dict[str, Any]:
    """Bytes that ZeRO keeps and that one more step sends, each beside the planner's."""
    mesh, engine = training.mesh, training.engine
    zero = engine.zero.optimizer  # type: ignore[attr-defined]
    kept = [*zero.bit16_groups_flat, *zero.single_partition_of_fp32_groups]
    for state in engine.optimizer.state.values():
        kept += [state[moment] for moment in engine.moments]
    sent = measure_sent(lambda: advance(training, steps + 1), DEVICE, 1)
    sae = {"k": K, "d_sae": D_SAE}
    train = training.cfg.model_dump(exclude_unset=True)
    config = parse_config({"output": "x", "sae": sae, "train": train})
    work = work_of("x", config, D_IN, "float32", on_gpu=False)
    memory = memory_of_rank(work, mesh.num_shards, mesh.num_replicas).kept
    told = [memory[name] for name in ("weights", "master weights", "moments")]
    told_sent = step_sent(work, mesh.num_shards, mesh.num_replicas, training.dead.num_listed)
    # DeepSpeed holds the gather of the weights by a name of its own, where it is not counted.
    seen = sum(one.bytes for one in told_sent if one.what != "weights")
    return {
        "kept": (sum(t.numel() * t.element_size() for t in kept), sum(told)),
        "sent": (sent.bytes, seen),
    }


def save(training: SAETraining, folder: Path) -> None:
    state, share = training.state(), HostShare(1 << 36)
    writer = CheckpointWriter("x", folder, state, training.mesh, DEVICE, 1, share)
    writer.begin(training.state())
    writer.wait()
    writer.close()


def load(folder: Path, kind: str, replicas: int) -> SAETraining:
    training = make(kind, make_mesh(None, replicas, device=DEVICE))
    sae = training.sae
    training.load_state(checkpoint.load(folder, KEPT, sae.first_latent, sae.d_sae_local))
    return training


def resume(folder: Path, kind: str, mesh: Mesh) -> dict[str, Any]:
    """The losses of a run behind its checkpoint; of what goes on from it on the same mesh, which
    ends with the same bits or not; of other engines and meshes, and of the same engine from a
    fused one's checkpoint.
    """
    run = make(kind, mesh)
    advance(run, KEPT)
    save(run, folder / "own")
    found: dict[str, Any] = {"want": advance(run, KEPT + AFTER)}
    again = load(folder / "own", kind, 2)
    found["again"] = advance(again, KEPT + AFTER)
    both = zip(again.sae.parameters(), run.sae.parameters(), strict=True)
    found["same bits"] = [torch.equal(a, b) for a, b in both]
    for other, replicas in (("zero1", 1), ("zero2", 4), ("autograd", 2), ("fused", 1)):
        losses = advance(load(folder / "own", other, replicas), KEPT + AFTER)
        found[f"{other} on {replicas}"] = losses
    save(load(folder / "own", "fused", 2), folder / "fused")
    found["back"] = advance(load(folder / "fused", kind, 2), KEPT + AFTER)
    found["forgotten"] = forgotten(run)
    return {name: torch.tensor(value) for name, value in found.items()}


def forgotten(training: SAETraining) -> list[bool]:
    """Whether forgetting some latents zeroes their moments, and no others."""
    mask = torch.arange(training.sae.d_sae_local, device=DEVICE) % 3 == 1
    before = {name: t.clone() for name, t in training.state().rows.items()}
    training.engine.forget_(mask)
    right = []
    for name, after in training.state().rows.items():
        if name.startswith("exp_avg") and training.mesh.replica == 0:
            right += [bool(before[name][mask].any()), not after[mask].any()]
            right.append(torch.equal(after[~mask], before[name][~mask]))
    return right


def broken(kind: str, mesh: Mesh) -> str:
    """What a row that is not finite ends a run with."""
    training = make(kind, mesh)
    advance(training, 1)
    x = batch(1, training.master_dtype)
    x[5, 2] = torch.inf
    try:
        training.step(x, PhaseTimer(DEVICE, enabled=False))
    except UserError as e:
        return str(e)
    return "nothing"


def large() -> dict[str, Any]:
    """1e9 parameters on a GPU of which this process may take 24 GiB, Adam on the host: what the
    planner says of it without and with offload; losses, bytes on the GPU between two steps and at
    most.
    """
    torch.set_num_threads(os.cpu_count() or 1)
    d_in, d_sae, n = 4096, 131_072, 8192
    whole = torch.cuda.get_device_properties(DEVICE).total_memory
    torch.cuda.set_per_process_memory_fraction(24 * GIB / whole, DEVICE)
    launch, refused, works = launch_here(DEVICE, 1, memory_of(DEVICE)), {}, {}
    for name in ("zero2", "zero2_offload"):
        config = parse_config(
            {
                "output": "x",
                "sae": {"k": 32, "d_sae": d_sae},
                "train": {
                    **{"engine": "deepspeed", "batch_tokens": n, "num_tokens": 10 * n},
                    **{"deepspeed_config": str(ROOT / "configs" / "deepspeed" / f"{name}.json")},
                    **{"warmup_steps": 0, "lr": 1e-4},
                },
            }
        )
        works[name], refused[name] = work_of("x", config, d_in, "float32", on_gpu=True), ""
        try:
            check_memory(works[name], 1, 1, launch)
        except ConfigError as e:
            refused[name] = str(e)
    assert config.sae is not None
    assert config.train is not None
    mesh, before = Mesh.single(), torch.cuda.memory_allocated()
    training = SAETraining(config.sae, config.train, d_in, mesh, DEVICE, rms=1.0)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    losses, seconds = [], 0.0
    for _ in range(5):
        began = time.perf_counter()
        losses.append(float(training.step(x, PhaseTimer(DEVICE, enabled=False)).fvu))
        seconds = time.perf_counter() - began
    state = training.state()
    return {
        "refused": refused,
        "peak": torch.cuda.max_memory_allocated() - before,
        "planned": memory_of_rank(works["zero2_offload"], 1, 1).own,
        "ms": 1e3 * seconds,
        "planned ms": step_time(works["zero2_offload"], launch, 1, 1, dead=0).ms,
        "losses": losses,
        "parameters": sum(p.numel() for p in training.sae.parameters()),
        "bytes": torch.cuda.memory_allocated(),
        "devices": [state.rows[f"{m}.W_enc"].device.type for m in training.engine.moments],
        "off": float((training.sae.W_dec.norm(dim=1) - 1).abs().max()),
    }


def run(folder: str, replicas: str, *cases: str) -> dict[str, Any]:
    """By case, which is an engine, options and steps, such as `zero2-all-50`, or `zero2-resumed`,
    for which there is a folder."""
    if cases == ("large",):
        return large()
    mesh = make_mesh(None, int(replicas), device=DEVICE)
    FOLDERS.append(Path(folder))
    # All verbs are imported by now.
    found: dict[str, Any] = {"imported": "deepspeed" in sys.modules}
    for case in cases:
        kind, option, *steps = case.split("-")
        if option == "broken":
            found[case] = broken(kind, mesh)
        elif option == "resumed":
            found[case] = resume(Path(folder), kind, mesh)
        else:
            found[case] = train(kind, option, int(steps[0]), mesh)
    return found


if __name__ == "__main__":
    worker(run)
