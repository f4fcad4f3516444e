"""sparsify's `SparseCoder`, `Trainer` and configs:

    from flash_sae_dist.compat.sparsify import SaeConfig, Trainer, TrainConfig, SparseCoder

The library need not be installed. Both optimizers step on the fused engine: "signum", the default,
is the library's schedule-free sign descent, "adam" has float32 moments where the library takes
bitsandbytes' 8 bits if they are installed. AuxK trains the encoder, too,
which the library's does not.

Not covered, and refused by name: transcode, skip_connection, multi_topk, activation="groupmax",
optimizer="muon", loss_fn "ce" and "kl", k_decay_steps, distribute_modules, several processes.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ..evaluation.results import natural
from ..interop import files
from ..interop.hub import local_copy
from ..models.base import Slots
from ..models.topk import TopKSAE
from ..progress import progress_bar
from ..training.optim import project_decoder_grad_
from .recipe import FusedTraining, Recipe, missing, refuse

_ABSENT = {
    "MemmapDataset": "give a datasets.Dataset",
    "chunk_and_tokenize": "import it from sparsify",
}


def __getattr__(name: str) -> Any:
    if name == "chunk_and_tokenize":
        # Tokenises a data set for any trainer; nothing of it runs here.
        from sparsify.data import chunk_and_tokenize

        return chunk_and_tokenize
    raise missing("sparsify", _ABSENT, name)


@dataclass
class SparseCoderConfig:
    """Shape of a sparse coder; see sparsify."""

    activation: str = "topk"
    expansion_factor: int = 32
    normalize_decoder: bool = True
    num_latents: int = 0
    k: int = 32
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False

    def __post_init__(self) -> None:
        only = {"activation": "topk", "normalize_decoder": True}
        only |= dict.fromkeys(("multi_topk", "skip_connection", "transcode"), False)
        refuse("sparsify", vars(self), only)

    def to_dict(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


@dataclass
class TrainConfig:
    """How sparse coders are trained; see sparsify."""

    sae: SparseCoderConfig
    batch_size: int = 32
    grad_acc_steps: int = 1
    micro_acc_steps: int = 1
    loss_fn: str = "fvu"
    optimizer: str = "signum"
    lr: float | None = None
    lr_warmup_steps: int = 1000
    k_decay_steps: int = 0
    auxk_alpha: float = 0.0
    dead_feature_threshold: int = 10_000_000
    exclude_tokens: list[int] = field(default_factory=list)
    hookpoints: list[str] = field(default_factory=list)
    init_seeds: list[int] = field(default_factory=lambda: [0])
    layers: list[int] = field(default_factory=list)
    layer_stride: int = 1
    distribute_modules: bool = False
    save_every: int = 1000
    save_best: bool = False
    finetune: str | None = None
    log_to_wandb: bool = True
    run_name: str | None = None
    wandb_log_frequency: int = 1
    save_dir: str = "checkpoints"

    def __post_init__(self) -> None:
        if self.layers and self.layer_stride != 1:
            raise ValueError("Cannot specify both `layers` and `layer_stride`.")
        only: dict[str, Any] = {"loss_fn": "fvu", "k_decay_steps": 0, "distribute_modules": False}
        refuse("sparsify", vars(self), only | {"optimizer": ("adam", "signum"), "save_best": False})


class EncoderOutput(NamedTuple):
    """The active latents."""

    top_acts: Tensor
    top_indices: Tensor
    pre_acts: Tensor | None


class ForwardOutput(NamedTuple):
    """A forward pass."""

    sae_out: Tensor
    latent_acts: Tensor
    latent_indices: Tensor
    fvu: Tensor
    auxk_loss: Tensor
    multi_topk_fvu: Tensor


class SparseCoder(nn.Module):
    """sparsify's sparse coder: its parameters are a `TopKSAE`'s."""

    def __init__(
        self,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        decoder: bool = True,
    ) -> None:
        super().__init__()
        refuse("sparsify", {"decoder": decoder}, {"decoder": True})
        self.cfg, self.d_in = cfg, d_in
        self.num_latents = cfg.num_latents or d_in * cfg.expansion_factor
        # As the library draws them, so that a seed gives its weights.
        self.encoder = nn.Linear(d_in, self.num_latents, device=device, dtype=dtype)
        sae = TopKSAE(
            d_in, self.num_latents, cfg.k, seed=None, device=device,
            dtype=self.encoder.weight.dtype,
        )  # fmt: skip
        with torch.no_grad():
            sae.W_enc.copy_(self.encoder.weight)
            sae.W_dec.copy_(self.encoder.weight)
        self.encoder.weight, self.encoder.bias = sae.W_enc, sae.b_enc
        self.W_dec, self.b_dec, self.W_skip = sae.W_dec, sae.b_dec, None
        # In a list, whose modules are not this one's: no parameter twice.
        self._held = [sae]
        self.set_decoder_norm_to_unit_norm()

    @property
    def sae(self) -> TopKSAE:
        """The SAE that is trained."""
        return self._held[0]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.W_dec.dtype

    def encode(self, x: Tensor) -> EncoderOutput:
        """The k active latents; no dense pre-activations are made."""
        codes = self.sae.encode(x)
        return EncoderOutput(codes.values, codes.latents.long(), None)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """The reconstruction of active latents."""
        return self.sae.decode(Slots(top_acts, top_indices.to(torch.int32)))

    def forward(self, x: Tensor, y: Tensor | None = None, **unused: Any) -> ForwardOutput:
        """Reconstructs x, and measures that."""
        refuse("sparsify", {"y": y, **unused}, dict.fromkeys(("y", *unused), None))
        out = self.sae(x)
        flat = x.reshape(-1, self.d_in)
        variance = (flat - flat.mean(0)).square().sum()
        fvu = (x - out.recon).square().sum() / variance
        none = fvu.new_zeros(())
        acts, latents = out.codes.values, out.codes.latents.long()
        return ForwardOutput(out.recon, acts, latents, fvu, none, none)

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Scales decoder rows to norm 1."""
        eps = torch.finfo(self.W_dec.dtype).eps
        self.W_dec.div_(self.W_dec.norm(dim=1, keepdim=True) + eps)

    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Takes what lies along a decoder row out of its gradient."""
        project_decoder_grad_(self.sae)

    def save_to_disk(self, path: str | Path) -> None:
        """Writes what sparsify's `SparseCoder.load_from_disk` reads."""
        files.write_safetensors(Path(path) / "sae.safetensors", self.state_dict())
        files.write_config(Path(path) / "cfg.json", {**self.cfg.to_dict(), "d_in": self.d_in})

    @staticmethod
    def load_from_disk(
        path: str | Path, device: str | torch.device = "cpu", *, decoder: bool = True
    ) -> SparseCoder:
        """Reads what `save_to_disk` or sparsify wrote."""
        config = files.read_config(Path(path) / "cfg.json")
        weights = files.read_safetensors(Path(path) / "sae.safetensors")
        d_in = config.pop("d_in")
        known = {k: v for k, v in config.items() if k in SparseCoderConfig.__dataclass_fields__}
        dtype = weights["W_dec"].dtype
        found = SparseCoder(d_in, SparseCoderConfig(**known), device, dtype, decoder=decoder)
        found.load_state_dict(weights)
        return found

    @staticmethod
    def load_from_hub(
        name: str, hookpoint: str | None = None, device: str | torch.device = "cpu"
    ) -> SparseCoder:
        """Reads one of the Hugging Face hub."""
        return SparseCoder.load_from_disk(local_copy(name, hookpoint or ""), device)

    @staticmethod
    def load_many(
        name: str,
        local: bool = False,
        layers: list[str] | None = None,
        device: str | torch.device = "cpu",
        *,
        pattern: str | None = None,
    ) -> dict[str, SparseCoder]:
        """Reads those of all hookpoints of a folder, or of a repository."""
        root = Path(name) if local else local_copy(name)
        names = layers or [p.name for p in root.iterdir() if p.is_dir()]
        names = [n for n in names if pattern is None or fnmatchcase(n, pattern)]
        ordered = sorted(names, key=natural)
        return {n: SparseCoder.load_from_disk(root / n, device) for n in ordered}


def _compute_dtype(coder: SparseCoder) -> torch.dtype:
    """The library's forward pass is in bfloat16 on GPUs."""
    return torch.bfloat16 if coder.device.type == "cuda" else torch.float32


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Float32 products, which are the language model's, in TF32 as the library has them."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Fused:
    """The fused engine: Adam with the library's schedule, or its schedule-free sign descent."""

    def __init__(self, coder: SparseCoder, cfg: TrainConfig, total_steps: int) -> None:
        scale, self.sign = (coder.num_latents / 2**14) ** 0.5, cfg.optimizer == "signum"
        if self.sign:
            refuse("sparsify", vars(cfg), {"auxk_alpha": 0.0})
        recipe = Recipe(
            cfg.lr or (5e-3 if self.sign else 2e-4) / scale, "fvu",
            betas=(0.95 if self.sign else 0.9, 0.999), sign=self.sign, aux_coef=cfg.auxk_alpha,
            aux_by_loss=True, dead_after_tokens=cfg.dead_feature_threshold,
            micro_batches=cfg.micro_acc_steps,
        )  # fmt: skip
        self.coder, self.training = coder, FusedTraining(coder.sae, recipe, _compute_dtype(coder))
        self.optimizer, self.goes_on = self.training.optimizer, False
        warmup = cfg.lr_warmup_steps

        def factor(step: int) -> float:
            if self.sign:
                return 1.0
            if step < warmup:
                return step / max(1, warmup)
            return max(0.0, (total_steps - step) / max(1, total_steps - warmup))

        self.scheduler = LambdaLR(self.optimizer, factor)

    def step(self, x: Tensor) -> Tensor:
        """One step; the loss stays on the device."""
        if self.sign:
            self.coder.set_decoder_norm_to_unit_norm()
            if self.training.steps == 0 and not self.goes_on:
                # Weights may have been set since the optimizer was made.
                self.training.engine.begin_()
        if self.sign or self.training.steps == 0:
            self.training.refresh()
        fvu = self.training.step(x).fvu
        self.scheduler.step()
        return fvu

    def swap(self, *, to_average: bool) -> None:
        """Puts what is saved in the weights' place, and back; Adam saves them as they are."""
        if self.sign:
            self.optimizer.swap_(to_average=to_average)


def _rows(acts: Tensor, kept: Tensor | None) -> Tensor:  # [batch, sequence, d_in] -> [N, d_in]
    return acts.flatten(0, 1) if kept is None else acts[kept]


def _blocks(model: Any) -> str:
    """Name of the list of a model's layers."""
    count = model.config.num_hidden_layers
    for name, module in model.base_model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return str(name)
    raise ValueError("the model has no list of its layers; give hookpoints")


class Trainer:
    """sparsify's Trainer: one forward pass of the model a batch, a step of every sparse coder."""

    def __init__(self, cfg: TrainConfig, dataset: Any, model: Any) -> None:
        self.cfg, self.dataset, self.model = cfg, dataset, model
        base = model.base_model
        if cfg.hookpoints:
            assert not cfg.layers, "Cannot specify both `hookpoints` and `layers`."
            names = [name for name, _ in base.named_modules()]
            found = [n for n in names if any(fnmatchcase(n, p) for p in cfg.hookpoints)]
            cfg.hookpoints = sorted(found, key=natural)
        else:
            cfg.layers = cfg.layers or list(range(model.config.num_hidden_layers))
            cfg.hookpoints = [f"{_blocks(model)}.{i}" for i in cfg.layers]
        cfg.hookpoints = cfg.hookpoints[:: cfg.layer_stride]
        self.saes: dict[str, SparseCoder] = {}
        widths = self._widths()
        for hook in cfg.hookpoints:
            for seed in cfg.init_seeds:
                torch.manual_seed(seed)
                name = f"{hook}/seed{seed}" if len(cfg.init_seeds) > 1 else hook
                self.saes[name] = SparseCoder(widths[hook], cfg.sae, model.device, torch.float32)
        if cfg.finetune:
            for name, coder in self.saes.items():
                given = SparseCoder.load_from_disk(Path(cfg.finetune) / name, model.device)
                coder.load_state_dict(given.state_dict())
        self.num_batches = len(dataset) // cfg.batch_size
        self.global_step = 0
        # Its schedules count batches, and move with each step.
        self.steppers = {n: _Fused(c, cfg, self.num_batches) for n, c in self.saes.items()}

    @torch.no_grad()
    def _activations(self, ids: Tensor) -> dict[str, Tensor]:
        """What each hookpoint gives [batch, sequence, d_in]."""
        seen: dict[str, Tensor] = {}

        def taken(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                del module, inputs
                seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

            return hook

        with ExitStack() as hooks:
            for name in self.cfg.hookpoints:
                module = self.model.base_model.get_submodule(name)
                handle = module.register_forward_hook(taken(name))
                hooks.callback(handle.remove)
            # Without the head, whose logits nobody reads.
            self.model.base_model(ids)
        return seen

    def _widths(self) -> dict[str, int]:
        ids = torch.zeros(1, 2, dtype=torch.long, device=self.model.device)
        return {name: acts.shape[-1] for name, acts in self._activations(ids).items()}

    def _batches(self) -> Iterator[Tensor]:
        size, data = self.cfg.batch_size, self.dataset
        if getattr(data, "format", {}).get("type") in (None, "torch", "numpy"):
            # Its own tensors are made row by row: milliseconds a batch.
            data = data.with_format("numpy")
        for at in range(self.global_step * size, len(data), size):
            ids = data[at : at + size]["input_ids"]
            yield torch.tensor(ids).to(self.model.device)

    def fit(self) -> None:
        """Trains on the data set once, and saves."""
        with _tensor_cores():
            self._fit()

    def _fit(self) -> None:
        log = self._logger()
        excluded = torch.tensor(self.cfg.exclude_tokens, device=self.model.device, dtype=torch.long)
        waiting: list[dict[str, Tensor]] = []
        with progress_bar("Training", self.num_batches - self.global_step, "batches", True) as bar:
            for ids in self._batches():
                # Without a mask, whose rows the host would wait for, where all tokens are kept.
                kept = torch.isin(ids, excluded, invert=True) if len(excluded) else None
                seen = self._activations(ids).items()
                waiting.append({n: _rows(x, kept).float() for n, x in seen})
                if self.global_step == 0 and not self.cfg.finetune:
                    self._centre(waiting[0])
                step, rest = divmod(self.global_step + 1, self.cfg.grad_acc_steps)
                self.global_step += 1
                if rest == 0:
                    losses, waiting = self._step(waiting), []
                    if (step + 1) % self.cfg.save_every == 0:
                        self.save()
                    if log is not None and (step + 1) % self.cfg.wandb_log_frequency == 0:
                        log({f"fvu/{n}": float(loss) for n, loss in losses.items()}, step=step)
                bar.advance(1)
        self.save()

    def _step(self, waiting: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        rows = {n: torch.cat([batch[n] for batch in waiting]) for n in waiting[0]}
        return {n: s.step(rows[n.partition("/")[0]]) for n, s in self.steppers.items()}

    @torch.no_grad()
    def _centre(self, rows: dict[str, Tensor]) -> None:
        for name, coder in self.saes.items():
            coder.b_dec.copy_(rows[name.partition("/")[0]].mean(0))

    def _logger(self) -> Any:
        if not self.cfg.log_to_wandb:
            return None
        try:
            wandb = importlib.import_module("wandb")
            wandb.init(name=self.cfg.run_name, project="sparsify", config=asdict(self.cfg))
        except (AttributeError, ImportError):
            print("Weights & Biases not available, skipping logging.")
            self.cfg.log_to_wandb = False
            return None
        return wandb.log

    def _folder(self) -> Path:
        return Path(self.cfg.save_dir) / (self.cfg.run_name or "unnamed")

    def save(self) -> None:
        """Writes every sparse coder, and what `load_state` goes on from."""
        folder = self._folder()
        for name, coder in self.saes.items():
            stepper = self.steppers[name]
            stepper.swap(to_average=True)
            coder.save_to_disk(folder / name)
            stepper.swap(to_average=False)
            state = {
                "optimizer": stepper.optimizer.state_dict(),
                "lr_scheduler": stepper.scheduler.state_dict(),
                "tokens_since_fired": stepper.training.dead.tokens_since_fired,
            }
            torch.save(state, folder / name / "optimizer.pt")
        (folder / "config.json").write_text(json.dumps(asdict(self.cfg), indent=4))
        torch.save({"global_step": self.global_step}, folder / "state.pt")

    def load_state(self, path: str) -> None:
        """Goes on from what `save` wrote."""
        place = self.model.device
        read = torch.load(f"{path}/state.pt", weights_only=True)
        self.global_step = int(read["global_step"])
        for name, coder in self.saes.items():
            coder.load_state_dict(files.read_safetensors(Path(path) / name / "sae.safetensors"))
            file, stepper = Path(path) / name / "optimizer.pt", self.steppers[name]
            state = torch.load(file, map_location=place, weights_only=True)
            stepper.optimizer.load_state_dict(state["optimizer"])
            stepper.swap(to_average=False)
            stepper.goes_on = True
            stepper.scheduler.load_state_dict(state["lr_scheduler"])
            stepper.training.dead.tokens_since_fired.copy_(state["tokens_since_fired"])


Sae, SaeConfig, SaeTrainer = SparseCoder, SparseCoderConfig, Trainer
