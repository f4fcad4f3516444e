"""dictionary_learning's `trainSAE`, `TopKTrainer` and `AutoEncoderTopK`:

    from flash_sae_dist.compat.dictionary_learning import trainSAE, TopKTrainer, AutoEncoderTopK

The library need not be installed but for `ActivationBuffer`, which is its own. A step is the
library's: mean squared length of the error, AuxK, gradients along decoder rows taken out, their
norm clipped to 1, Adam, decoder rows at norm 1; the loss is not read by the host.

Not covered, and refused by name: use_wandb, activations_split_by_head, transcoder, k_anneal_steps,
other dict_class, and trainers of other architectures.
"""

from __future__ import annotations

import importlib
import json
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.base import SAEOutput
from ..models.losses import geometric_median
from ..progress import progress_bar
from ..training.optim import default_lr
from .recipe import FusedTraining, Recipe, Watched, missing, not_covered, refuse

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
_ABSENT = {
    "BatchTopKTrainer": "this version has no architecture batch_topk",
    "MatryoshkaBatchTopKTrainer": "this version has no architecture matryoshka",
    "JumpReluTrainer": "this version has no architecture jumprelu",
    "StandardTrainer": "this version has no architecture relu",
    "GatedSAETrainer": "this version has no architecture gated",
}


def __getattr__(name: str) -> Any:
    if name in ("ActivationBuffer", "buffer"):
        # The library's own loop over a language model.
        return getattr(importlib.import_module("dictionary_learning"), name)
    raise missing("dictionary_learning", _ABSENT, name)


class AutoEncoderTopK(nn.Module):
    """dictionary_learning's TopK autoencoder: its parameters are views of a `TopKSAE`'s."""

    k: Tensor
    threshold: Tensor

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        super().__init__()
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.register_buffer("k", torch.tensor(k, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(-1.0))
        # In the library's order, so that a seed gives its weights.
        self.decoder = nn.Linear(dict_size, activation_dim, bias=False)
        self.encoder = nn.Linear(activation_dim, dict_size)
        sae = Watched(activation_dim, dict_size, k, seed=None)
        with torch.no_grad():
            rows = self.decoder.weight.T
            sae.W_dec.copy_(rows / (rows.norm(dim=1, keepdim=True) + torch.finfo(rows.dtype).eps))
            sae.W_enc.copy_(sae.W_dec)
        self.encoder.weight, self.encoder.bias, self.b_dec = sae.W_enc, sae.b_enc, sae.b_dec
        # In a list, whose modules are not this one's: no parameter twice.
        self._held = [sae]
        self._tie()

    @property
    def sae(self) -> Watched:
        """The SAE that is trained."""
        return self._held[0]

    def _tie(self) -> None:
        """Makes the decoder's weight [d_in, d_sae] a view of W_dec."""
        self.decoder.weight.data = self.sae.W_dec.data.T

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AutoEncoderTopK:
        # The encoder's and b_dec are the SAE's own: moved by the module's walk.
        self.sae.W_dec.data = fn(self.sae.W_dec.data)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def encode(
        self, x: Tensor, return_topk: bool = False, use_threshold: bool = False
    ) -> Tensor | tuple[Tensor, ...]:
        """Dense activations; with return_topk also the k's values, indices, and all after ReLU."""
        if not return_topk and not use_threshold:
            return self.sae.encode_dense(x)
        every = torch.relu(self.encoder(x - self.b_dec))
        codes = self.sae.encode(x)
        values, indices = codes.values, codes.latents
        if use_threshold:
            acts = every * (every > self.threshold)
        else:
            acts = torch.zeros_like(every).scatter(-1, indices.long(), values)
        return (acts, values, indices, every) if return_topk else acts

    def decode(self, x: Tensor) -> Tensor:
        """The reconstruction of dense activations."""
        out: Tensor = self.decoder(x) + self.b_dec
        return out

    def forward(self, x: Tensor, output_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """The reconstruction, with output_features also the dense activations."""
        out: SAEOutput = self.sae(x)
        if not output_features:
            return out.recon
        return out.recon, self.sae.dense(out.codes)

    @torch.no_grad()
    def scale_biases(self, scale: float) -> None:
        """Turns weights for rows into those for rows times scale."""
        self.encoder.bias.mul_(scale)
        self.b_dec.mul_(scale)
        if self.threshold >= 0:
            self.threshold.mul_(scale)

    @staticmethod
    def from_pretrained(
        path: str | Path, k: int | None = None, device: Any = None
    ) -> AutoEncoderTopK:
        """Reads an `ae.pt`."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        stored = int(state["k"]) if "k" in state else k
        if k is not None and stored != k or stored is None:
            raise ValueError(f"k={k}, but {path} holds k={stored}")
        d_sae, d_in = state["encoder.weight"].shape
        found = AutoEncoderTopK(d_in, d_sae, stored)
        found.load_state_dict(state)
        return found if device is None else found.to(device)


def _schedule(steps: int, warmup_steps: int, decay_start: int | None) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if decay_start is not None and step >= decay_start:
            return (steps - step) / (steps - decay_start)
        return 1.0

    return factor


_TOLD = frozenset(
    ("steps", "activation_dim", "dict_size", "k", "layer", "lm_name", "auxk_alpha", "warmup_steps")
    + ("decay_start", "threshold_beta", "threshold_start_step", "seed", "wandb_name")
    + ("submodule_name",)
)


class TopKTrainer:
    """dictionary_learning's TopKTrainer on the fused engine."""

    logging_parameters = ("effective_l0", "dead_features", "pre_norm_auxk_loss")

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        dict_class: type = AutoEncoderTopK,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int = 1000,
        k_anneal_steps: int | None = None,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str = "AutoEncoderTopK",
        submodule_name: str | None = None,
    ) -> None:
        told = {name: value for name, value in locals().items() if name in _TOLD}
        refuse("dictionary_learning", locals(), {"k_anneal_steps": None})
        if dict_class.__name__ != "AutoEncoderTopK":
            not_covered(f"dict_class={dict_class.__name__}", "leave it out")
        self.lr: float = default_lr(dict_size) if lr is None else lr
        self._told: dict[str, Any] = told | {"lr": self.lr}
        self.steps, self.layer, self.lm_name = steps, layer, lm_name
        self.wandb_name, self.submodule_name = wandb_name, submodule_name
        self.auxk_alpha, self.threshold_beta = auxk_alpha, threshold_beta
        self.threshold_start_step = threshold_start_step
        if seed is not None:
            torch.manual_seed(seed)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.ae = AutoEncoderTopK(activation_dim, dict_size, k).to(self.device)
        self.ae.sae.watch()
        self._factor = _schedule(steps, warmup_steps, decay_start)
        self._training: FusedTraining | None = None

    @property
    def training(self) -> FusedTraining:
        """The engine, made at its first use: in bfloat16 where that is under autocast."""
        if self._training is None:
            kind, dtype = torch.device(self.device).type, torch.float32
            if torch.is_autocast_enabled(kind):
                dtype = torch.get_autocast_dtype(kind)
            recipe = Recipe(self.lr, "mse", grad_clip=1.0, aux_coef=self.auxk_alpha)
            self._training = FusedTraining(self.ae.sae, recipe, dtype)
            self.scheduler = torch.optim.lr_scheduler.LambdaLR(
                self._training.optimizer, self._factor
            )
        return self._training

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """Adam over the SAE's rows."""
        return self.training.optimizer

    @torch.no_grad()
    def update(self, step: int, x: Tensor) -> Tensor:
        """One step; returns its loss, which stays on the device."""
        x = x.to(self.device)
        if step == 0:
            self.ae.b_dec.copy_(geometric_median(x.float()))
        metrics = self.training.step(x)
        self.scheduler.step()
        if step > self.threshold_start_step:
            least, threshold = self.ae.sae.least, self.ae.threshold
            moved = self.threshold_beta * threshold + (1 - self.threshold_beta) * least
            threshold.copy_(torch.where(threshold < 0, least, moved))
        return metrics.fvu + self.auxk_alpha * metrics.aux

    @torch.no_grad()
    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The loss of a batch without AuxK; with logging a LossLog of dense activations."""
        del step
        x = x.to(self.device, self.ae.b_dec.dtype)
        x_hat, f = self.ae(x, output_features=True)
        l2 = (x - x_hat).square().sum(dim=-1).mean()
        if not logging:
            return l2
        return LossLog(x, x_hat, f, {"l2_loss": l2.item(), "loss": l2.item()})

    def get_logging_parameters(self) -> dict[str, Any]:
        """What the library logs of a trainer."""
        dead = int(self.training.dead.count())
        return {"effective_l0": int(self.ae.k), "dead_features": dead, "pre_norm_auxk_loss": -1}

    @property
    def config(self) -> dict[str, Any]:
        """What is written beside the weights."""
        names = {"trainer_class": "TopKTrainer", "dict_class": "AutoEncoderTopK"}
        return names | self._told | {"device": str(self.device)}


def trainSAE(
    data: Iterable[Tensor],
    trainer_configs: list[dict[str, Any]],
    steps: int,
    use_wandb: bool = False,
    wandb_entity: str = "",
    wandb_project: str = "",
    save_steps: list[int] | None = None,
    save_dir: str | None = None,
    log_steps: int | None = None,
    activations_split_by_head: bool = False,
    transcoder: bool = False,
    run_cfg: dict[str, Any] | None = None,
    normalize_activations: bool = False,
    verbose: bool = False,
    device: str = "cuda",
    autocast_dtype: torch.dtype = torch.float32,
    backup_steps: int | None = None,
) -> list[TopKTrainer]:
    """Trains SAEs from batches [B, D]; returns their trainers, whose `ae` are the SAEs."""
    covered = {"use_wandb": False, "activations_split_by_head": False, "transcoder": False}
    refuse("dictionary_learning", locals(), covered)
    trainers = [
        config["trainer"](**{k: v for k, v in config.items() if k != "trainer"})
        for config in trainer_configs
    ]
    folders = _folders(save_dir, trainers, getattr(data, "config", {}))
    batches = iter(data)
    norm = _norm_factor(batches) if normalize_activations else 1.0
    with progress_bar("trainSAE", steps, "steps", True) as bar, _autocast(device, autocast_dtype):
        for step, act in enumerate(_first(batches, steps)):
            act = act.to(dtype=autocast_dtype) / norm
            if verbose and log_steps and step % log_steps == 0:
                _log(trainers, step, act)
            _save_at(step, save_steps, backup_steps, folders, trainers, norm)
            for trainer in trainers:
                trainer.update(step, act)
            bar.advance(1)
    _finish(trainers, folders, norm)
    return trainers


def _finish(trainers: list[TopKTrainer], folders: list[Path], norm: float) -> None:
    for trainer in trainers:
        trainer.ae.scale_biases(norm)
    for folder, trainer in zip(folders, trainers, strict=False):
        _save(trainer, folder / "ae.pt")


def _folders(save_dir: str | None, trainers: list[TopKTrainer], buffer: Any) -> list[Path]:
    """A folder for each trainer with its config; none where nothing is saved."""
    if save_dir is None:
        return []
    folders = [Path(save_dir) / f"trainer_{i}" for i in range(len(trainers))]
    for folder, trainer in zip(folders, trainers, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        told = {"trainer": trainer.config, "buffer": buffer}
        (folder / "config.json").write_text(json.dumps(told, indent=4, default=str))
    return folders


def _autocast(device: str, dtype: torch.dtype) -> Any:
    """The library's: on GPUs alone."""
    kind = torch.device(device).type
    if kind == "cpu" or dtype == torch.float32:
        return nullcontext()
    return torch.autocast(kind, dtype=dtype)


def _first(batches: Iterator[Tensor], steps: int) -> Iterator[Tensor]:
    for _, act in zip(range(steps), batches, strict=False):
        yield act


def _norm_factor(batches: Iterator[Tensor], steps: int = 100) -> float:
    """Root of the mean squared norm of the first rows."""
    squares = [act.float().square().sum(dim=1).mean() for act in _first(batches, steps)]
    return float(torch.stack(squares).mean().sqrt())


def _log(trainers: list[TopKTrainer], step: int, act: Tensor) -> None:
    for trainer in trainers:
        found = trainer.loss(act, step=step, logging=True)
        l0 = float((found.f != 0).float().sum(dim=-1).mean())
        explained = 1 - float((found.x - found.x_hat).var(dim=0).sum() / found.x.var(dim=0).sum())
        print(f"Step {step}: L0 = {l0}, frac_variance_explained = {explained}")


def _save_at(
    step: int,
    save_steps: list[int] | None,
    backup_steps: int | None,
    folders: list[Path],
    trainers: list[TopKTrainer],
    norm: float,
) -> None:
    for folder, trainer in zip(folders, trainers, strict=False):
        if save_steps is not None and step in save_steps:
            trainer.ae.scale_biases(norm)
            _save(trainer, folder / "checkpoints" / f"ae_{step}.pt")
            trainer.ae.scale_biases(1 / norm)
        if backup_steps is not None and step % backup_steps == 0:
            state = {
                "step": step, "ae": trainer.ae.state_dict(), "config": trainer.config,
                "optimizer": trainer.optimizer.state_dict(), "norm_factor": norm,
            }  # fmt: skip
            torch.save(state, folder / "ae.pt")


def _save(trainer: TopKTrainer, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.cpu().contiguous() for k, v in trainer.ae.state_dict().items()}, file)
