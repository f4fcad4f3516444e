"""SAELens, dictionary_learning and sparsify trained on given rows, for `flash-sae bench quality`.

    PYTHON bench_quality_peers.py LIBRARY JOB.json

A script of its own, of torch, safetensors and the library alone: it runs in the environment in
which the library is installed. Weights are written as ours are: `pre = (x - b_dec) @ W_enc.T +
b_enc`, decoder rows of unit norm. Options that a job leaves open are the library's own; a warm-up
that is longer than a twentieth of the steps is that twentieth, as in few steps it would never end.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LIBRARIES = {
    "sae_lens": ("topk", "batch_topk", "matryoshka", "jumprelu"),
    "dictionary_learning": ("topk", "batch_topk", "matryoshka", "jumprelu"),
    "sparsify": ("topk",),
}
# Narrower prefixes of a Matryoshka SAE, as parts of its latents: SAEBench's, and our default.
_FRACTIONS = (1 / 32, 1 / 16, 1 / 8, 1 / 4)
Job = dict[str, Any]


def batches(rows: Tensor, batch: int, steps: int, seed: int) -> Iterator[Tensor]:
    """The same batches for every library: passes over the rows, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(rows), generator=generator)])
        yield rows[order[:batch]]
        order = order[batch:]


def _short(steps: int, usual: int) -> int:
    return min(usual, steps // 20)


def _unit(W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    """Norms of decoder rows taken into the encoder, which changes no reconstruction."""
    norms = W_dec.norm(dim=1).clamp_min(1e-12)
    found = {"W_enc": W_enc * norms[:, None], "b_enc": b_enc * norms}
    return {**found, "W_dec": W_dec / norms[:, None], "b_dec": b_dec}


def _sae_lens_config(job: Job, d_in: int) -> Any:
    saes = importlib.import_module("sae_lens")
    keys: dict[str, Any] = {"d_in": d_in, "d_sae": job["d_sae"]}
    if job["architecture"] == "topk":
        return saes.TopKTrainingSAEConfig(**keys, k=job["k"])
    if job["architecture"] == "batch_topk":
        return saes.BatchTopKTrainingSAEConfig(**keys, k=job["k"])
    if job["architecture"] == "matryoshka":
        parts = torch.tensor(_FRACTIONS).cumsum(0)
        widths = [int(part * job["d_sae"]) for part in parts] + [job["d_sae"]]
        return saes.MatryoshkaBatchTopKTrainingSAEConfig(
            **keys, k=job["k"], matryoshka_widths=widths
        )
    return saes.JumpReLUTrainingSAEConfig(
        **keys, jumprelu_sparsity_loss_mode="quadratic", target_l0=job["k"]
    )


def sae_lens(job: Job, rows: Tensor) -> dict[str, Tensor]:
    """By its SAETrainer."""
    config = importlib.import_module("sae_lens.config").SAETrainerConfig
    trainer = importlib.import_module("sae_lens.training.sae_trainer").SAETrainer
    registry = importlib.import_module("sae_lens.registry")
    torch.manual_seed(job["seed"])
    cfg = _sae_lens_config(job, rows.shape[1])
    sae = registry.get_sae_training_class(cfg.architecture())[0](cfg)
    trained = trainer(
        config(
            total_training_samples=job["steps"] * job["batch"],
            train_batch_size_samples=job["batch"],
            lr=3e-4 * job["lr_factor"],
            lr_end=3e-5 * job["lr_factor"],
        ),
        sae,
        batches(rows, job["batch"], job["steps"] + 1, job["seed"]),
    )
    trained.fit()
    W_enc, b_enc = sae.W_enc.detach().T, sae.b_enc.detach()
    if not sae.cfg.apply_b_dec_to_input:
        b_enc = b_enc + W_enc @ sae.b_dec.detach()
    W_dec = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        # Activations are multiplied by the norms and divided by them again before the decoder.
        norms = W_dec.norm(dim=1, keepdim=True)
        W_enc, b_enc, W_dec = W_enc * norms, b_enc * norms[:, 0], W_dec / norms
    found = _unit(W_enc, b_enc, W_dec, sae.b_dec.detach())
    if hasattr(sae, "threshold"):
        found["threshold"] = sae.threshold.detach() * W_dec.norm(dim=1)
    return found


def _dictionary_learning_trainer(job: Job) -> tuple[Any, dict[str, Any]]:
    # Its package imports a buffer of activations, whose needs nothing here needs.
    for name in ("nnsight", "datasets", "zstandard", "wandb"):
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = stub = types.ModuleType(name)
            for attribute in ("LanguageModel", "load_dataset", "ZstdDecompressor"):
                setattr(stub, attribute, object)
    steps, k = job["steps"], job["k"]
    warm: dict[str, Any] = {"warmup_steps": _short(steps, 1000)}
    kinds = {
        "topk": ("top_k", "TopKTrainer", {"k": k}),
        "batch_topk": ("batch_top_k", "BatchTopKTrainer", {"k": k}),
        "matryoshka": (
            "matryoshka_batch_top_k",
            "MatryoshkaBatchTopKTrainer",
            {"k": k, "group_fractions": [*_FRACTIONS, 1 - sum(_FRACTIONS)]},
        ),
        "jumprelu": (
            "jumprelu",
            "JumpReluTrainer",
            {"target_l0": float(k), "sparsity_warmup_steps": _short(steps, 2000)},
        ),
    }
    module, name, own = kinds[job["architecture"]]
    found = importlib.import_module(f"dictionary_learning.trainers.{module}")
    return getattr(found, name), own | warm


def dictionary_learning(job: Job, rows: Tensor) -> dict[str, Tensor]:
    """By its trainers' `update`."""
    kind, own = _dictionary_learning_trainer(job)
    lr = 7e-5 if job["architecture"] == "jumprelu" else 2e-4 / (job["d_sae"] / 2**14) ** 0.5
    torch.manual_seed(job["seed"])
    trainer = kind(
        steps=job["steps"], activation_dim=rows.shape[1], dict_size=job["d_sae"], layer=0,
        lm_name="none", device="cpu", seed=job["seed"], lr=lr * job["lr_factor"], **own,
    )  # fmt: skip
    for step, x in enumerate(batches(rows, job["batch"], job["steps"], job["seed"])):
        trainer.update(step, x)
    ae = trainer.ae
    state = {name: tensor.detach() for name, tensor in ae.state_dict().items()}
    if "encoder.weight" in state:
        weights = (state["encoder.weight"], state["encoder.bias"], state["decoder.weight"].T)
    else:
        weights = (state["W_enc"].T, state["b_enc"], state["W_dec"])
    W_enc, b_enc, W_dec = weights
    if job["architecture"] != "jumprelu":
        return _unit(W_enc, b_enc, W_dec, state["b_dec"])
    if not getattr(ae, "apply_b_dec_to_input", False):
        b_enc = b_enc + W_enc @ state["b_dec"]
    found = _unit(W_enc, b_enc, W_dec, state["b_dec"])
    found["threshold"] = state["threshold"] * W_dec.norm(dim=1)
    return found


def sparsify(job: Job, rows: Tensor) -> dict[str, Tensor]:
    """The steps that its Trainer makes, with its default optimizer."""
    library = importlib.import_module("sparsify")
    sign = importlib.import_module("sparsify.sign_sgd").SignSGD
    free = importlib.import_module("schedulefree").ScheduleFreeWrapper
    # On a CPU its own choice, a Triton kernel, does not run.
    coder, utils = (
        importlib.import_module(f"sparsify.{name}") for name in ("sparse_coder", "utils")
    )
    vars(coder)["decoder_impl"] = utils.eager_decode
    torch.manual_seed(job["seed"])
    cfg = library.SaeConfig(num_latents=job["d_sae"], k=job["k"])
    sae = library.SparseCoder(rows.shape[1], cfg, "cpu", dtype=torch.float32)
    lr = 5e-3 / (job["d_sae"] / 2**14) ** 0.5 * job["lr_factor"]
    optimizer = free(sign([{"params": sae.parameters(), "lr": lr}]), momentum=0.95)
    optimizer.train()
    for step, x in enumerate(batches(rows, job["batch"], job["steps"], job["seed"])):
        if step == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        sae(x).fvu.backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.eval()
    weights = {"W_enc": sae.encoder.weight, "b_enc": sae.encoder.bias}
    weights |= {"W_dec": sae.W_dec, "b_dec": sae.b_dec}
    return {name: tensor.detach() for name, tensor in weights.items()}


TRAIN: dict[str, Callable[[Job, Tensor], dict[str, Tensor]]] = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
}


def synthetic(job: Job) -> dict[str, Tensor]:
    """Rows of SAELens's synthetic benchmark, and the features that they are made of."""
    module = importlib.import_module("sae_lens.synthetic")
    cfg = module.SyntheticModelConfig(
        num_features=job["num_features"], hidden_dim=job["d_in"], seed=0
    )
    made = module.SyntheticModel(cfg)
    torch.manual_seed(0)
    with torch.no_grad():
        parts = [made.sample(4096) for _ in range(-(-job["rows"] // 4096))]
    features = made.feature_dict.feature_vectors.detach()
    return {"rows": torch.cat(parts)[: job["rows"]].contiguous(), "features": features.contiguous()}


def main(library: str, file: str) -> None:
    """Does a file's jobs; a line of output for each that is done."""
    job = json.loads(Path(file).read_text())
    torch.set_num_threads(job["threads"])
    if "synthetic" in job:
        save_file(synthetic(job["synthetic"]), job["out"])
        return
    for own in job["jobs"]:
        begun = time.perf_counter()
        found = TRAIN[library](own, load_file(own["rows"])["rows"])
        save_file({name: t.contiguous().clone() for name, t in found.items()}, own["out"])
        print(f"done {time.perf_counter() - begun:.2f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
