"""SAELens's trainer, and its TopK, BatchTopK, Matryoshka and JumpReLU SAEs for training:

    from flash_sae_dist.compat.sae_lens import (
        LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig, SAETrainer,
        SAETrainerConfig, TopKTrainingSAE, TopKTrainingSAEConfig)

`SAETrainer` steps on the fused engine; its own classes are used where SAELens is installed, and of
TopK classes of the same fields where it is not. The other training SAEs need it installed, and
what runs a language model: `LanguageModelSAETrainingRunner`, its config, and whatever else SAELens
exports.

Decoder rows keep their norms, and pre-activations are ranked by them, as SAELens does by default.
Not covered, and refused by name: other architectures, hook_z, apply_b_dec_to_input=False,
normalize_activations but none and expected_average_only_in, use_matryoshka_aux_loss, and of
JumpReLU tanh, pre_act_loss_coefficient and weights but float32.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import interop
from ..progress import progress_bar
from .recipe import FusedTraining, Recipe, missing, refuse
from .sae_lens_architectures import MAKERS

HAS_LIBRARY = importlib.util.find_spec("sae_lens") is not None
_BY_US = "train it by `flash-sae train` with sae.architecture="
_ABSENT = {
    f"{theirs}{end}": instead
    for theirs, instead in (
        ("StandardTrainingSAE", f"{_BY_US}relu"),
        ("GatedTrainingSAE", f"{_BY_US}gated"),
        ("AbsTopKTrainingSAE", "train it by sae_lens"),
        ("MatchingPursuitTrainingSAE", "train it by sae_lens"),
        ("MultiSAETrainingRunner", "`flash-sae grid` trains many SAEs from one pass of a model"),
    )
    for end in ("", "Config")
}
# The second is what older scripts call the first.
_RUNNERS = ("LanguageModelSAETrainingRunner", "SAETrainingRunner")


def __getattr__(name: str) -> Any:
    if name in _ABSENT or name.startswith("__"):
        raise missing("SAELens", _ABSENT, name)
    if name in _RUNNERS:
        return _runner(name)
    if not HAS_LIBRARY:
        raise ImportError(f"SAELens's {name} runs on SAELens itself; pip install sae-lens")
    return getattr(importlib.import_module("sae_lens"), name)


def _runner(name: str) -> type:
    """SAELens's runner, with the trainer of this file, and a store that reads tokens faster."""
    if not HAS_LIBRARY:
        raise ImportError(f"{name} runs on SAELens; pip install sae-lens")
    library: Any = importlib.import_module("sae_lens.llm_sae_training_runner")
    # It makes its trainer and its store by these names.
    library.SAETrainer = SAETrainer
    library.ActivationsStore = importlib.import_module(f"{__package__}.sae_lens_store").Store
    found: type = getattr(library, name)
    return found


if TYPE_CHECKING or not HAS_LIBRARY:

    @dataclass
    class LoggingConfig:
        """What is logged; see SAELens."""

        log_to_wandb: bool = True
        wandb_project: str = "sae_lens_training"
        wandb_log_frequency: int = 10
        eval_every_n_wandb_logs: int = 100

    @dataclass
    class SAETrainerConfig:
        """How an SAE is trained; see SAELens."""

        total_training_samples: int
        train_batch_size_samples: int
        lr: float = 3e-4
        lr_end: float | None = None
        lr_scheduler_name: str = "constant"
        lr_warm_up_steps: int = 0
        lr_decay_steps: int = 0
        n_restart_cycles: int = 1
        adam_beta1: float = 0.9
        adam_beta2: float = 0.999
        device: str = "cpu"
        autocast: bool = False
        dead_feature_window: int = 1000
        feature_sampling_window: int = 2000
        n_checkpoints: int = 0
        checkpoint_path: str | None = None
        save_final_checkpoint: bool = False
        logger: LoggingConfig = field(default_factory=lambda: LoggingConfig(log_to_wandb=False))
        n_batches_for_norm_estimate: int = 1000

        @property
        def total_training_steps(self) -> int:
            """Steps of a training."""
            return self.total_training_samples // self.train_batch_size_samples

    @dataclass
    class TopKTrainingSAEConfig:
        """A TopK SAE for training; see SAELens."""

        d_in: int
        d_sae: int
        dtype: str = "float32"
        device: str = "cpu"
        apply_b_dec_to_input: bool = True
        normalize_activations: str = "none"
        reshape_activations: str = "none"
        decoder_init_norm: float | None = 0.1
        k: int = 100
        use_sparse_activations: bool = False
        aux_loss_coefficient: float = 1.0
        rescale_acts_by_decoder_norm: bool = True

        @classmethod
        def architecture(cls) -> str:
            """SAELens's name of it."""
            return "topk"

    class TopKTrainingSAE(nn.Module):
        """SAELens's TopK SAE for training: W_enc is [d_in, d_sae]."""

        def __init__(self, cfg: TopKTrainingSAEConfig) -> None:
            super().__init__()
            self.cfg, dtype = cfg, getattr(torch, cfg.dtype)
            W_dec = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.d_in, dtype=dtype))
            if cfg.decoder_init_norm is not None:
                W_dec = W_dec / W_dec.norm(dim=-1, keepdim=True) * cfg.decoder_init_norm
            self.b_dec = nn.Parameter(torch.zeros(cfg.d_in, dtype=dtype))
            self.W_dec = nn.Parameter(W_dec)
            self.W_enc = nn.Parameter(W_dec.T.clone().contiguous())
            self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, dtype=dtype))
            self.to(cfg.device)

        @property
        def device(self) -> torch.device:
            """Where it is."""
            return self.W_dec.device

        def encode(self, x: Tensor) -> Tensor:
            """Dense activations."""
            pre = (x - self.b_dec) @ self.W_enc + self.b_enc
            norms = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else 1.0
            top = (pre * norms).topk(self.cfg.k, dim=-1)
            return torch.zeros_like(pre).scatter(-1, top.indices, top.values.relu())

        def decode(self, feature_acts: Tensor) -> Tensor:
            """The reconstruction of dense activations."""
            if self.cfg.rescale_acts_by_decoder_norm:
                feature_acts = feature_acts / self.W_dec.norm(dim=-1)
            return feature_acts @ self.W_dec + self.b_dec

        def forward(self, x: Tensor) -> Tensor:
            """The reconstruction."""
            return self.decode(self.encode(x))

        def save_inference_model(self, path: str | Path) -> tuple[Path, Path]:
            """Writes what SAELens's `SAE.load_from_disk` reads."""
            weights = {n: p.detach().contiguous() for n, p in self.state_dict().items()}
            weights["W_enc"] = weights["W_enc"].T.contiguous()
            if self.cfg.rescale_acts_by_decoder_norm:
                weights = interop.contents.with_unit_rows(weights)
            interop.save(interop.Contents("topk", weights, {"k": self.cfg.k}), path, "sae_lens")
            folder = Path(path)
            return folder / "sae_weights.safetensors", folder / "cfg.json"

        save_model = save_inference_model

else:
    from sae_lens import LoggingConfig, TopKTrainingSAE, TopKTrainingSAEConfig  # noqa: F401
    from sae_lens.config import SAETrainerConfig  # noqa: F401


class StepOutput(NamedTuple):
    """What a step made, on the device."""

    loss: Tensor
    losses: dict[str, Tensor]
    l0: Tensor


class Scaler:
    """Scales rows to a mean norm of sqrt(d_in), where that is asked for."""

    def __init__(self) -> None:
        self.scaling_factor: float | None = None

    def scale(self, acts: Tensor) -> Tensor:
        """Rows as the SAE is trained on them."""
        return acts if self.scaling_factor is None else acts * self.scaling_factor

    __call__ = scale

    def unscale(self, acts: Tensor) -> Tensor:
        """Undoes `scale`."""
        return acts if self.scaling_factor is None else acts / self.scaling_factor

    def estimate(self, d_in: int, batches: Iterator[Tensor], count: int) -> None:
        """Takes the factor from batches, one after another until it stands."""
        norms = [float(next(batches).norm(dim=-1).mean()) for _ in range(count)]
        self.scaling_factor = math.sqrt(d_in) / (sum(norms) / len(norms))


def _schedule(cfg: Any) -> Callable[[int], float]:
    """SAELens's learning rates as parts of cfg.lr: warm-up, constant or cosine, decay to 0."""
    refuse("SAELens", vars(cfg), {"lr_scheduler_name": ("constant", "cosineannealing")})
    steps, warm, decay = cfg.total_training_steps, cfg.lr_warm_up_steps, cfg.lr_decay_steps
    end = cfg.lr / 10 if cfg.lr_end is None else cfg.lr_end
    cosine, middle = cfg.lr_scheduler_name == "cosineannealing", max(1, steps - warm - decay)
    last = end / cfg.lr if cosine else 1.0

    def factor(step: int) -> float:
        if step < warm:
            return float((step + 1) / warm)
        if decay and step >= steps - decay:
            return float(last * (1 - (step - (steps - decay)) / decay))
        turn = math.pi * (step - warm) / middle
        return float(last + (1 - last) * (1 + math.cos(turn)) / 2) if cosine else 1.0

    return factor


class SAETrainer:
    """SAELens's SAETrainer on the fused engine."""

    def __init__(
        self,
        cfg: Any,
        sae: Any,
        data_provider: Iterator[Tensor],
        evaluator: Callable[..., dict[str, Any]] | None = None,
        save_checkpoint_fn: Callable[..., None] | None = None,
    ) -> None:
        given = {name: getattr(sae.cfg, name, None) for name in (*_COVERED, "architecture")}
        given["architecture"] = sae.cfg.architecture()
        refuse("SAELens", given, {**_COVERED, "architecture": tuple(MAKERS)})
        self.cfg, self.sae, self.data_provider = cfg, sae, data_provider
        self.evaluator, self.save_checkpoint_fn = evaluator, save_checkpoint_fn
        self.activation_scaler: Any = Scaler()
        self.n_training_steps = self.n_training_samples = self.n_frac_active_samples = 0
        self.sae.to(cfg.device)
        self._inner = self._tied()
        # Of n_checkpoints + 1 equal parts all borders but the ends.
        part = math.ceil(cfg.total_training_samples / (cfg.n_checkpoints + 1))
        self.checkpoint_thresholds = list(range(0, cfg.total_training_samples, part))[1:]
        recipe = Recipe(
            cfg.lr, "mse", betas=(cfg.adam_beta1, cfg.adam_beta2), grad_clip=1.0, unit_norm=False,
            aux_coef=getattr(sae.cfg, "aux_loss_coefficient", 0.0), aux_by_loss=True,
            dead_after_tokens=cfg.dead_feature_window * cfg.train_batch_size_samples,
        )  # fmt: skip
        dtype = torch.bfloat16 if cfg.autocast else torch.float32
        self._training = FusedTraining(self._inner, recipe, dtype)
        self.optimizer = self._training.optimizer
        factor = _schedule(cfg)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def _tied(self) -> Any:
        """An SAE of this library whose memory is the given one's parameters."""
        sae, cfg = self.sae, self.sae.cfg
        place = {"seed": None, "dtype": sae.W_dec.dtype, "device": sae.W_dec.device}
        inner = MAKERS[cfg.architecture()](cfg, place)
        inner.watch(ranks_by_norm=getattr(cfg, "rescale_acts_by_decoder_norm", False))
        with torch.no_grad():
            inner.W_enc.copy_(sae.W_enc.T)
        for name, param in inner.named_parameters():
            if name != "W_enc":
                param.data = getattr(sae, name).data
        sae.W_enc.data = inner.W_enc.data.T
        return inner

    @property
    def act_freq_scores(self) -> Tensor:
        """How often each latent fired since the counts began."""
        fired: Tensor = self._inner.fired
        return fired

    @property
    def n_forward_passes_since_fired(self) -> Tensor:
        """Steps since each latent fired."""
        since = self._training.dead.tokens_since_fired
        size: int = self.cfg.train_batch_size_samples
        return since / size

    @property
    def feature_sparsity(self) -> Tensor:
        """Share of rows on which each latent fired."""
        return self.act_freq_scores / max(1, self.n_frac_active_samples)

    @property
    def log_feature_sparsity(self) -> Tensor:
        """Its logarithm to base 10."""
        return torch.log10(self.feature_sparsity + 1e-10).cpu()

    @property
    def dead_neurons(self) -> Tensor:
        """Latents that have not fired for dead_feature_window steps."""
        window: int = self.cfg.dead_feature_window
        return self.n_forward_passes_since_fired > window

    def fit(self) -> Any:
        """Trains to the end; returns the SAE, for rows as they are."""
        cfg, provider = self.cfg, self.data_provider
        scales = self.sae.cfg.normalize_activations == "expected_average_only_in"
        if scales and self.activation_scaler.scaling_factor is None:
            count = cfg.n_batches_for_norm_estimate
            self.activation_scaler.estimate(self.sae.cfg.d_in, iter(provider), count)
        with progress_bar("Training SAE", cfg.total_training_samples, "samples", True) as bar:
            while self.n_training_samples < cfg.total_training_samples:
                if self.n_training_steps % cfg.feature_sampling_window == 0:
                    self._inner.fired.zero_()
                    self.n_frac_active_samples = 0
                before = self.n_training_samples
                output = self.step(next(provider))
                self._log(output)
                self.n_training_steps += 1
                self._checkpoint_if_due()
                bar.advance(self.n_training_samples - before)
        self._fold()
        if cfg.save_final_checkpoint:
            self.save_checkpoint(f"final_{self.n_training_samples}")
        self._untie()
        return self.sae

    def step(self, batch: Tensor) -> StepOutput:
        """One step on rows [N, d_in]."""
        batch = batch.to(self.sae.W_dec.device).reshape(-1, self.sae.cfg.d_in)
        self.n_training_samples += len(batch)
        self.n_frac_active_samples += len(batch)
        warm = getattr(self.sae.cfg, "l0_warm_up_steps", 0)
        if self.n_training_steps <= warm:
            self._training.engine.set_ramp(self.n_training_steps / warm if warm else 1.0)
        metrics = self._training.step(self.activation_scaler(batch))
        self.lr_scheduler.step()
        self._move_threshold()
        if self.sae.cfg.architecture() == "jumprelu":
            more = {"l0_loss": metrics.penalty}
        else:
            aux = self._training.engine.dead_step.coef * metrics.aux
            more = {"auxiliary_reconstruction_loss": aux}
        (also,) = more.values()
        return StepOutput(metrics.fvu + also, {"mse_loss": metrics.fvu, **more}, metrics.l0)

    @torch.no_grad()
    def _move_threshold(self) -> None:
        """The moving average of a batch's least activation, where the SAE has one."""
        if (threshold := getattr(self.sae, "topk_threshold", None)) is not None:
            least, lr = self._inner.least.to(threshold.dtype), self.sae.cfg.topk_threshold_lr
            threshold.copy_(torch.where(least > 0, (1 - lr) * threshold + lr * least, threshold))

    def _log(self, output: StepOutput) -> None:
        logger, step = self.cfg.logger, self.n_training_steps
        if not logger.log_to_wandb or (step + 1) % logger.wandb_log_frequency:
            return
        values = {f"losses/{n}": float(v) for n, v in output.losses.items()}
        values |= {
            "losses/overall_loss": float(output.loss),
            "metrics/l0": float(output.l0),
            "sparsity/dead_features": int(self.dead_neurons.sum()),
            "details/current_learning_rate": self.optimizer.param_groups[0]["lr"],
            "details/n_training_samples": self.n_training_samples,
        }
        every = logger.wandb_log_frequency * logger.eval_every_n_wandb_logs
        if self.evaluator is not None and (step + 1) % every == 0:
            values |= self.evaluator(self.sae, self.data_provider, self.activation_scaler)
        importlib.import_module("wandb").log(values, step=step)

    def _fold(self) -> None:
        """Weights for rows that are not scaled."""
        factor = self.activation_scaler.scaling_factor
        if factor is None:
            return
        with torch.no_grad():
            self.sae.W_enc.mul_(factor)
            self.sae.W_dec.div_(factor)
            self.sae.b_dec.div_(factor)
            if hasattr(self.sae, "topk_threshold") and self.sae.cfg.rescale_acts_by_decoder_norm:
                # In units of pre-activations times norms of decoder rows.
                self.sae.topk_threshold.div_(factor)
        self.sae.cfg.normalize_activations = "none"
        self.activation_scaler.scaling_factor = None

    def _untie(self) -> None:
        """Gives the SAE's encoder memory of its own, in its own order, as files want it."""
        self.sae.W_enc.data = self.sae.W_enc.data.contiguous()

    def _checkpoint_if_due(self) -> None:
        due = self.checkpoint_thresholds
        if due and self.n_training_samples > due[0]:
            self.save_checkpoint(str(self.n_training_samples))
            due.pop(0)

    def save_checkpoint(self, checkpoint_name: str, base_path: Path | str | None = None) -> None:
        """Writes weights, sparsity and what `load_trainer_state` goes on from."""
        base = base_path if base_path is not None else self.cfg.checkpoint_path
        folder = None if base is None else Path(base) / checkpoint_name
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            tied = self.sae.W_enc.data
            self._untie()
            self.sae.save_model(str(folder))
            self.sae.W_enc.data = tied
            save_file({"sparsity": self.log_feature_sparsity}, folder / "sparsity.safetensors")
            self.save_trainer_state(folder)
        if self.save_checkpoint_fn is not None:
            self.save_checkpoint_fn(checkpoint_path=folder)

    def save_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Writes optimizer, schedule and counts."""
        state = {
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "n_training_samples": self.n_training_samples,
            "n_training_steps": self.n_training_steps,
            "n_frac_active_samples": self.n_frac_active_samples,
            "fired": self._inner.fired,
            "tokens_since_fired": self._training.dead.tokens_since_fired,
            "scaling_factor": self.activation_scaler.scaling_factor,
        }
        torch.save(state, Path(checkpoint_path) / "trainer_state.pt")

    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        """Goes on from what `save_trainer_state` wrote. The weights are given to the SAE apart."""
        file = Path(checkpoint_path) / "trainer_state.pt"
        state = torch.load(file, map_location=self.cfg.device, weights_only=True)
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        self.n_training_samples = state["n_training_samples"]
        self.n_training_steps = state["n_training_steps"]
        self.n_frac_active_samples = state["n_frac_active_samples"]
        self._inner.fired.copy_(state["fired"])
        self._training.dead.tokens_since_fired.copy_(state["tokens_since_fired"])
        self.activation_scaler.scaling_factor = state["scaling_factor"]
        self._training.steps = self.n_training_steps
        self._training.tokens = self.n_training_samples


_COVERED = {
    "apply_b_dec_to_input": True,
    "normalize_activations": ("none", "expected_average_only_in"),
    "reshape_activations": "none",
}
