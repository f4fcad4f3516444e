"""dictionary_learning's `trainSAE`, its TopK, BatchTopK and Matryoshka trainers and dictionaries:

    from flash_sae_dist.compat.dictionary_learning import (
        AutoEncoderTopK, BatchTopKSAE, BatchTopKTrainer, MatryoshkaBatchTopKSAE,
        MatryoshkaBatchTopKTrainer, TopKTrainer, trainSAE)

The library need not be installed but for `ActivationBuffer`, which is its own. A step is the
library's: mean squared length of the error, AuxK, gradients along decoder rows taken out, their
norm clipped to 1, Adam, decoder rows at norm 1; the loss is not read by the host.

Not covered, and refused by name: use_wandb, activations_split_by_head, transcoder, k_anneal_steps,
other dict_class, and trainers of other architectures.
"""

from __future__ import annotations

import importlib
import json
import math
from collections import namedtuple
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.losses import geometric_median
from ..progress import progress_bar
from ..training.optim import default_lr
from .dictionaries import AutoEncoderTopK, BatchTopKSAE, Dictionary, MatryoshkaBatchTopKSAE
from .recipe import FusedTraining, Recipe, missing, not_covered, refuse

LossLog = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
_BY_US = "train it by `flash-sae train` with sae.architecture="
_READ = "flash_sae_dist.interop.load reads its file, as an SAE of this library"
_ABSENT = {
    "JumpReluTrainer": f"{_BY_US}jumprelu",
    "StandardTrainer": f"{_BY_US}relu",
    "StandardTrainerAprilUpdate": f"{_BY_US}relu",
    "PAnnealTrainer": "train it by dictionary_learning",
    "GatedSAETrainer": f"{_BY_US}gated",
    "GatedAnnealTrainer": f"{_BY_US}gated",
    **dict.fromkeys(
        ("AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "JumpReluAutoEncoder", "CrossCoder"),
        _READ,
    ),
    "load_dictionary": f"AutoEncoderTopK.from_pretrained reads an ae.pt, and {_READ}",
    "evaluate": "`flash-sae evaluate SAE=trainer_0/ae.pt` measures an SAE",
}
# The library's own loops over a language model.
_BUFFERS = ("ActivationBuffer", "HeadActivationBuffer", "NNsightActivationBuffer")


def __getattr__(name: str) -> Any:
    if name in _BUFFERS:
        return getattr(importlib.import_module("dictionary_learning.buffer"), name)
    if name == "buffer":
        return importlib.import_module("dictionary_learning.buffer")
    raise missing("dictionary_learning", _ABSENT, name)


def _schedule(steps: int, warmup_steps: int, decay_start: int | None) -> Callable[[int], float]:
    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        if decay_start is not None and step >= decay_start:
            return (steps - step) / (steps - decay_start)
        return 1.0

    return factor


_TOLD = frozenset(
    (
        "steps",
        "activation_dim",
        "dict_size",
        "k",
        "lr",
        "layer",
        "lm_name",
        "auxk_alpha",
        "warmup_steps",
    )
    + ("decay_start", "threshold_beta", "threshold_start_step", "seed", "wandb_name")
    + ("submodule_name", "group_fractions", "group_weights")
)


class _Trainer:
    """What its trainers of both rules share."""

    logging_parameters = ("effective_l0", "dead_features", "pre_norm_auxk_loss")
    trainer_class: str
    dict_class: type[Dictionary]

    def _begin(
        self,
        told: dict[str, Any],
        dict_class: type,
        wandb_name: str,
        device: str | None,
        **more: Any,  # of the dictionary
    ) -> None:
        if dict_class.__name__ != self.dict_class.__name__:
            not_covered(f"dict_class={dict_class.__name__}", "leave it out")
        width, lr = told["dict_size"], told.pop("lr")
        self.lr: float = default_lr(width) if lr is None else lr
        self._told: dict[str, Any] = told | {"lr": self.lr}
        self.steps, self.layer, self.lm_name = told["steps"], told["layer"], told["lm_name"]
        self.wandb_name, self.submodule_name = wandb_name, told["submodule_name"]
        self.auxk_alpha, self.threshold_beta = told["auxk_alpha"], told["threshold_beta"]
        self.threshold_start_step = told["threshold_start_step"]
        if told["seed"] is not None:
            torch.manual_seed(told["seed"])
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dictionary = self.dict_class(told["activation_dim"], width, told["k"], **more)
        self.ae: Any = dictionary.to(self.device)
        self.ae.sae.watch()
        self._factor = _schedule(told["steps"], told["warmup_steps"], told["decay_start"])
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
        loss: Tensor = metrics.fvu + self.auxk_alpha * metrics.aux
        return loss

    @torch.no_grad()
    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The loss of a batch without AuxK; with logging a LossLog of dense activations."""
        del step
        x = x.to(self.device, self.ae.b_dec.dtype)
        f = self.ae.encode(x, use_threshold=False)
        assert isinstance(f, Tensor)
        x_hat = self.ae.decode(f)
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
        names = {"trainer_class": self.trainer_class, "dict_class": self.dict_class.__name__}
        return names | self._told | {"device": str(self.device)}


class TopKTrainer(_Trainer):
    """dictionary_learning's TopKTrainer on the fused engine."""

    trainer_class, dict_class = "TopKTrainer", AutoEncoderTopK

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
        self._begin(told, dict_class, wandb_name, device)


class BatchTopKTrainer(_Trainer):
    """dictionary_learning's BatchTopKTrainer on the fused engine."""

    trainer_class, dict_class = "BatchTopKTrainer", BatchTopKSAE

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        dict_class: type = BatchTopKSAE,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int = 1000,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str = "BatchTopKSAE",
        submodule_name: str | None = None,
    ) -> None:
        told = {name: value for name, value in locals().items() if name in _TOLD}
        self._begin(told, dict_class, wandb_name, device)


class MatryoshkaBatchTopKTrainer(_Trainer):
    """dictionary_learning's MatryoshkaBatchTopKTrainer on the fused engine; `update` returns the
    error of the whole width.
    """

    trainer_class, dict_class = "MatryoshkaBatchTopKTrainer", MatryoshkaBatchTopKSAE

    def __init__(
        self,
        steps: int,
        activation_dim: int,
        dict_size: int,
        k: int,
        layer: int,
        lm_name: str,
        group_fractions: list[float],
        group_weights: list[float] | None = None,
        dict_class: type = MatryoshkaBatchTopKSAE,
        lr: float | None = None,
        auxk_alpha: float = 1 / 32,
        warmup_steps: int = 1000,
        decay_start: int | None = None,
        threshold_beta: float = 0.999,
        threshold_start_step: int = 1000,
        seed: int | None = None,
        device: str | None = None,
        wandb_name: str = "BatchTopKSAE",
        submodule_name: str | None = None,
    ) -> None:
        told = {name: value for name, value in locals().items() if name in _TOLD}
        if not math.isclose(sum(group_fractions), 1.0):
            raise ValueError(f"group_fractions={group_fractions} must sum to 1.0")
        sizes = [int(part * dict_size) for part in group_fractions[:-1]]
        sizes.append(dict_size - sum(sizes))
        weights = group_weights or [1 / len(sizes)] * len(sizes)
        if len(weights) != len(sizes):
            raise ValueError(f"group_weights={weights} must be as many as group_fractions")
        told |= {"group_weights": weights, "group_sizes": sizes}
        self._begin(told, dict_class, wandb_name, device, group_sizes=sizes)
        # The library's loss is the mean of weighted ones, not their sum.
        self.ae.sae.weights = tuple(weight / len(sizes) for weight in weights)

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False) -> Any:
        """The mean of the weighted losses of all prefixes, without AuxK; see TopKTrainer."""
        whole = super().loss(x, step, logging=True)
        sae = self.ae.sae
        with torch.no_grad():
            parts = zip(whole.f.split(self._told["group_sizes"], 1), sae.W_dec.split(
                self._told["group_sizes"]), sae.weights, strict=True)  # fmt: skip
            recon, total = sae.b_dec, whole.x.new_zeros(())
            for acts, rows, weight in parts:
                recon = recon + acts @ rows
                total = total + weight * (whole.x - recon).square().sum(dim=-1).mean()
        if not logging:
            return total
        return whole._replace(losses={"l2_loss": total.item(), "loss": total.item()})


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
) -> list[_Trainer]:
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


def _finish(trainers: list[_Trainer], folders: list[Path], norm: float) -> None:
    for trainer in trainers:
        trainer.ae.scale_biases(norm)
    for folder, trainer in zip(folders, trainers, strict=False):
        _save(trainer, folder / "ae.pt")


def _folders(save_dir: str | None, trainers: list[_Trainer], buffer: Any) -> list[Path]:
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


def _log(trainers: list[_Trainer], step: int, act: Tensor) -> None:
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
    trainers: list[_Trainer],
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


def _save(trainer: _Trainer, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v.cpu().contiguous() for k, v in trainer.ae.state_dict().items()}, file)
