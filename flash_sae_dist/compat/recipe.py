"""A library's training recipe on the fused engine: sparse gradients, one pass of Adam over rows."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..models.base import Codes, Pairs, Slots, SparseCoder
from ..models.batch_topk import BatchTopK
from ..models.dead_latents import CHECK_EVERY_STEPS, DeadLatents
from ..models.jumprelu import JumpReLU
from ..models.matryoshka import Matryoshka
from ..models.topk import TopKSAE
from ..training.engines.fused import FusedEngine
from ..training.metrics import StepMetrics
from ..training.sparse_adam import SparseAdam

# torch.optim.Adam's own, which all three libraries leave as it is.
ADAM_EPS = 1e-8


class Recipe(NamedTuple):
    """What tells one library's step from another's."""

    lr: float
    loss: Literal["fvu", "mse"]  # mse: the mean squared length of the error
    betas: tuple[float, float] = (0.9, 0.999)
    grad_clip: float | None = None
    unit_norm: bool = True  # decoder rows are kept at norm 1
    aux_coef: float = 0.0
    aux_by_loss: bool = False  # AuxK is normalised as the loss, and smaller with few dead latents
    dead_after_tokens: int = 10_000_000
    micro_batches: int = 1
    sign: bool = False  # schedule-free sign descent, its momentum betas[0]


class FusedTraining:
    """Steps an SAE by a recipe; `optimizer` is a torch.optim.Optimizer, for schedulers and
    state_dict."""

    def __init__(self, sae: SparseCoder, recipe: Recipe, compute_dtype: torch.dtype) -> None:
        device = sae.W_dec.device
        self.sae, self.recipe, self.steps, self.tokens = sae, recipe, 0, 0
        self.dead = DeadLatents(sae.d_sae, recipe.dead_after_tokens, sae.mesh, device)
        self.optimizer = SparseAdam(
            sae, recipe.lr, betas=recipe.betas, eps=ADAM_EPS, compute_dtype=compute_dtype,
            grad_clip=recipe.grad_clip, unit_norm=recipe.unit_norm, sign=recipe.sign,
            renorm=not recipe.sign,
        )  # fmt: skip
        self.k_aux = max(1, sae.d_in // 2)
        self.engine = FusedEngine(
            sae, self.optimizer, self.dead,
            dead_latents="auxk" if recipe.aux_coef > 0 else "none",
            aux_coef=recipe.aux_coef, k_aux=self.k_aux, micro_batches=recipe.micro_batches,
            loss=recipe.loss, aux_by_loss=recipe.aux_by_loss,
        )  # fmt: skip

    def refresh(self) -> None:
        """Takes in weights that were changed by other means."""
        self.engine.refresh_()

    def step(self, x: Tensor) -> StepMetrics:
        """One step on x [N, d_in]; metrics stay on the device, fvu being the loss."""
        # The libraries look at every step; a tenth of the wait is soon enough.
        every = min(CHECK_EVERY_STEPS, max(1, self.recipe.dead_after_tokens // (10 * len(x))))
        if self.recipe.aux_coef > 0 and self.steps % every == 0:
            self.dead.refresh(0, self.tokens)
            if self.recipe.aux_by_loss:
                part = min(1.0, self.dead.num_listed / self.k_aux)
                self.engine.dead_step.coef = self.recipe.aux_coef * part
        self.steps, self.tokens = self.steps + 1, self.tokens + len(x)
        return self.engine.step(x)


class Counts:
    """What fires while an SAE is trained, on the device.

    ranks_by_norm: latents are ranked by their pre-activations times the norms of their decoder
    rows, which then need not be 1.
    """

    d_sae: int
    W_dec: torch.nn.Parameter
    ranks_by_norm = False

    def norms(self) -> Tensor | None:
        """Of decoder rows, where latents are ranked by them."""
        return self.W_dec.detach().norm(dim=1) if self.ranks_by_norm else None

    def watch(self, *, ranks_by_norm: bool = False) -> None:
        """Begins to count."""
        self.ranks_by_norm = ranks_by_norm
        self.fired = torch.zeros(self.d_sae, device=self.W_dec.device)
        # What thresholds are made of.
        self.least = torch.zeros((), device=self.W_dec.device)

    def count(self, codes: Codes, least: Tensor) -> None:
        """Takes in a step's activations, and the least of them."""
        active = (codes.values > 0).flatten().to(self.fired.dtype)
        self.fired.index_add_(0, codes.latents.flatten().long(), active)
        self.least.copy_(least.to(self.least.dtype))


class WatchedBatch(Counts, BatchTopK):
    """A BatchTopK SAE with counts; `least` is a batch's least activation, 0 where it has none,
    times its decoder row's norm where latents are ranked by these.
    """

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Pairs:
        """See SparseCoder."""
        norms = self.norms()
        if norms is not None:
            W_enc, b_enc = W_enc * norms.to(W_enc.dtype)[:, None], b_enc * norms
        found = super().select(xc, W_enc, b_enc)
        least = found.values.masked_fill(found.values <= 0, torch.inf).amin()
        self.count(found, least.masked_fill(least.isinf(), 0))
        if norms is not None:
            found = found._replace(values=found.values / norms[found.latents.long()])
        return found


class WatchedMatryoshka(WatchedBatch, Matryoshka):
    """The same with a loss a prefix of latents; `weights` are those of the losses, the whole's
    last, where they are not the config's.
    """

    weights: tuple[float, ...] | None = None

    @property
    def level_weights(self) -> tuple[float, ...]:
        """See SparseCoder."""
        return super().level_weights if self.weights is None else self.weights


class WatchedJumpReLU(Counts, JumpReLU):
    """A JumpReLU SAE with counts; there is no `least`."""

    def observe_(self, active: list[Codes]) -> None:
        """See SparseCoder."""
        for codes in active:
            self.count(codes, self.least)


class Watched(Counts, TopKSAE):
    """A TopK SAE with counts; `least` is the mean over tokens of their least activation."""

    def select(self, xc: Tensor, W_enc: Tensor, b_enc: Tensor) -> Slots:
        """See SparseCoder."""
        if (norms := self.norms()) is not None:
            scaled = (W_enc * norms.to(W_enc.dtype)[:, None], b_enc * norms)
            values, indices = super().select(xc, *scaled)
            values = values / norms[indices.long()]
        else:
            values, indices = super().select(xc, W_enc, b_enc)
        codes = Slots(values, indices)
        self.count(codes, values.masked_fill(values <= 0, torch.inf).amin(dim=1).mean())
        return codes

    def encode_rows(self, x: Tensor) -> Slots:
        """See SparseCoder."""
        if not self.ranks_by_norm:
            return super().encode_rows(x)
        norms = self.W_dec.norm(dim=1)
        rows = TopKSAE(self.d_in, self.d_sae, self.k, seed=None, device="meta")
        rows.W_enc, rows.b_enc = (
            _parameter(self.W_enc * norms[:, None]),
            _parameter(self.b_enc * norms),
        )
        rows.b_dec = self.b_dec
        values, indices = rows.encode_rows(x)
        return Slots(values / norms[indices.long()], indices)


def _parameter(tensor: Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(tensor.detach())


def not_covered(what: str, instead: str) -> NoReturn:
    """Refuses what is not covered, by name."""
    raise NotImplementedError(f"{what} is not covered by flash_sae_dist.compat; {instead}")


def refuse(library: str, given: dict[str, Any], covered: dict[str, Any]) -> None:
    """Raises NotImplementedError for the first argument that has another value than is covered."""
    for name, only in covered.items():
        choices = only if isinstance(only, tuple) else (only,)
        if given[name] not in choices:
            shown = " or ".join(map(repr, choices))
            not_covered(
                f"{library}'s {name}={given[name]!r}", f"only {shown} is; drop it, or use {library}"
            )


def missing(library: str, names: dict[str, str], name: str) -> AttributeError | ImportError:
    """The error of a name that a module has not: covered nowhere, or known and why not."""
    if name in names:
        return ImportError(
            f"{library}'s {name} is not covered by flash_sae_dist.compat: {names[name]}"
        )
    return AttributeError(f"flash_sae_dist.compat has no {name!r} for {library}")
