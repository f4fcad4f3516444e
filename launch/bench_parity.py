"""Do faster steps train as well? The same activations, start and schedule through three trainers.

    python -m flash_sae_dist.launch.bench_parity STORE HOOKPOINT

Ours (the fused step on its kernels), dense PyTorch with OpenAI's AuxK, and sparsify's SparseCoder
with its own AuxK, all with bf16 compute, fp32 master weights, Adam and unit-norm decoder rows.
Measured in float32 on rows of the store that no trainer saw.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from ..activations.store import ActivationStore
from ..config.train import FusedTrainConfig, TrainConfig
from ..evaluation.metrics import measure
from ..kernels import reference
from ..models.losses import geometric_median
from ..models.topk import TopKConfig, TopKSAE
from ..parallel.mesh import Mesh
from ..training.metrics import PhaseTimer
from ..training.optim import lr_at, project_decoder_grad_, renormalise_decoder_
from ..training.step import SAETraining
from .bench_timing import print_table, write_json

DEVICE = torch.device("cuda")
HELD_OUT = 4096


def _rows(store: ActivationStore, hookpoint: str) -> Tensor:
    rows = torch.from_numpy(store.read(f"activations/{hookpoint}", 0, store.rows))
    return (rows.view(torch.bfloat16) if store.dtype == "bfloat16" else rows).to(DEVICE)


def _batches(rows: Tensor, cfg: TrainConfig) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(cfg.seed)
    for _ in range(cfg.num_tokens // cfg.batch_tokens):
        yield rows[torch.randint(len(rows), (cfg.batch_tokens,), generator=generator).to(DEVICE)]


def _ours(sae_cfg: TopKConfig, cfg: TrainConfig, rows: Tensor) -> TopKSAE:
    # The baselines' biases have the same learning rate as the weights.
    training = SAETraining(sae_cfg, cfg, rows.shape[1], Mesh.single(), DEVICE, rms=1.0)
    for x in _batches(rows, cfg):
        training.step(x, PhaseTimer(DEVICE, enabled=False))
    assert isinstance(training.sae, TopKSAE)
    return training.sae


def _start(sae_cfg: TopKConfig, cfg: TrainConfig, rows: Tensor) -> TopKSAE:
    sae = TopKSAE(rows.shape[1], sae_cfg.width(rows.shape[1]), sae_cfg.k, device=DEVICE)
    sae.reset_parameters(cfg.seed)
    with torch.no_grad():
        sae.b_dec.copy_(geometric_median(next(_batches(rows, cfg)).float()))
    return sae


def _adam(parameters: Any, cfg: TrainConfig) -> torch.optim.Adam:
    return torch.optim.Adam(parameters, lr=cfg.lr or 0, eps=cfg.adam_eps, fused=True)


def _silent(counter: Tensor, indices: Tensor, values: Tensor, cfg: TrainConfig) -> None:
    fired = torch.zeros_like(counter).index_add_(
        0, indices.flatten(), (values.flatten() > 0).to(counter.dtype)
    )
    counter.add_(cfg.batch_tokens).masked_fill_(fired > 0, 0)


def _dense(sae_cfg: TopKConfig, cfg: TrainConfig, rows: Tensor) -> TopKSAE:
    sae = _start(sae_cfg, cfg, rows)
    optimizer = _adam(sae.parameters(), cfg)
    silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=DEVICE)
    steps = cfg.num_tokens // cfg.batch_tokens
    for step, batch in enumerate(_batches(rows, cfg)):
        x = batch.float()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            pre = F.linear(x - sae.b_dec, sae.W_enc, sae.b_enc)
            top = pre.relu().topk(sae.k, dim=1)
            acts = torch.zeros_like(pre).scatter(1, top.indices, top.values)
            recon = acts @ sae.W_dec + sae.b_dec
        loss = (x - recon).square().sum() / (x - x.mean(0)).square().sum()
        dead = silent > cfg.dead_after_tokens
        if step % 100 == 0:
            k_aux = min(rows.shape[1] // 2, int(dead.sum()))
        if k_aux:
            aux = pre.masked_fill(~dead, -torch.inf).topk(k_aux, dim=1)
            with torch.autocast("cuda", dtype=torch.bfloat16):
                e_hat = torch.zeros_like(pre).scatter(1, aux.indices, aux.values.relu()) @ sae.W_dec
            e = (x - recon).detach()
            loss = loss + cfg.aux_coef * (e - e_hat).square().sum() / (e - e.mean(0)).square().sum()
        _silent(silent, top.indices, top.values, cfg)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        project_decoder_grad_(sae)
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, cfg.lr or 0, cfg)
        optimizer.step()
        renormalise_decoder_(sae)
    return sae


def _sparsify(sae_cfg: TopKConfig, cfg: TrainConfig, rows: Tensor) -> TopKSAE:
    from sparsify import SparseCoder, SparseCoderConfig

    sae = _start(sae_cfg, cfg, rows)
    shape = SparseCoderConfig(num_latents=sae.d_sae, k=sae.k)
    coder = SparseCoder(sae.d_in, shape, device=DEVICE)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    start = sae.state_dict()
    coder.load_state_dict({theirs: start[mine] for theirs, mine in names.items()})
    optimizer = _adam(coder.parameters(), cfg)
    silent = torch.zeros(sae.d_sae, dtype=torch.int64, device=DEVICE)
    steps = cfg.num_tokens // cfg.batch_tokens
    for step, batch in enumerate(_batches(rows, cfg)):
        coder.set_decoder_norm_to_unit_norm()
        out = coder(batch.float(), dead_mask=silent > cfg.dead_after_tokens)
        _silent(silent, out.latent_indices.long(), out.latent_acts, cfg)
        optimizer.zero_grad()
        (out.fvu + cfg.aux_coef * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.param_groups[0]["lr"] = lr_at(step, steps, cfg.lr or 0, cfg)
        optimizer.step()
    coder.set_decoder_norm_to_unit_norm()
    end = coder.state_dict()
    sae.load_state_dict({mine: end[theirs] for theirs, mine in names.items()})
    return sae


Trainer = Callable[[TopKConfig, TrainConfig, Tensor], TopKSAE]
TRAINERS: dict[str, Trainer] = {"ours": _ours, "dense PyTorch": _dense, "sparsify": _sparsify}


def _measured(sae: TopKSAE, held_out: Tensor) -> tuple[float, float]:
    """FVU and dead fraction in float32, selected by the reference."""
    exact = TopKSAE(sae.d_in, sae.d_sae, sae.k)
    exact.load_state_dict(sae.state_dict())
    metrics = measure(exact, torch.split(held_out.cpu(), 1024))
    assert reference.accumulate_dtype(exact.W_dec.dtype) == torch.float32
    return metrics.fvu, metrics.dead_fraction


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _several() -> None:
    """Quality of training."""


@app.command()
def parity(
    store: str,
    hookpoint: str,
    steps: int = 1500,
    d_sae: int = 8192,
    k: int = 32,
    seeds: int = 3,
    dead_after_tokens: int = 200_000,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """FVU and dead latents of three trainers on the same real activations."""
    rows = _rows(ActivationStore.open(store), hookpoint)
    seen, held_out = rows[:-HELD_OUT], rows[-HELD_OUT:]
    table: list[dict[str, Any]] = []
    for name, train in TRAINERS.items():
        found = []
        for seed in range(seeds):
            cfg = FusedTrainConfig(
                num_tokens=steps * 2048,
                batch_tokens=2048,
                lr=5e-4,
                warmup_steps=100,
                dead_after_tokens=dead_after_tokens,
                seed=seed,
            )
            found.append(_measured(train(TopKConfig(k=k, d_sae=d_sae), cfg, seen), held_out))
        row: dict[str, Any] = {"trainer": name}
        row |= {f"FVU, seed {i}": f"{fvu:.5f}" for i, (fvu, _) in enumerate(found)}
        row["mean FVU"] = f"{statistics.mean(fvu for fvu, _ in found):.5f}"
        row["dead on held-out rows"] = statistics.mean(dead for _, dead in found)
        table.append(row)
    print_table(f"Training quality, {torch.cuda.get_device_name()}", table)
    if json is not None:
        write_json(json, "parity", table)


if __name__ == "__main__":
    app()
