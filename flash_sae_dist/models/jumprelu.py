"""JumpReLU: a trained threshold a latent (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..config.sae import SAEConfig
from ..kernels import ops
from ..parallel.collectives import all_gather
from .base import Codes
from .dead_latents import mean_of_living
from .sparsity import Batch, Edges, jump, step
from .threshold import NEVER, ThresholdCoder, encode_above
from .usual import TrainDefaults


class _Usual(NamedTuple):
    """Defaults that go with a sparsity loss."""

    coefficient: float
    warmup: float
    bandwidth: float
    threshold: float
    to_input: bool


# DeepMind's bandwidth and first threshold are 0.001 for rows of norm 1; of norm sqrt(d_in), for
# their widths of 2304 to 4608, they are SAELens's 0.05 (its first threshold of 0.01 lies a little
# lower). Coefficient of l0: within Gemma Scope's 2e-4 to 6e-3. That of target is
# dictionary_learning's; tanh is Anthropic's update of January 2025.
_DEEPMIND = _Usual(1e-3, 0.05, 0.05, 0.01, False)
_USUAL = {
    "l0": _DEEPMIND,
    "target": _DEEPMIND._replace(coefficient=1.0),
    "quadratic": _DEEPMIND._replace(coefficient=1e-3),
    "tanh": _Usual(20.0, 1.0, 2.0, 0.1, True),
}


# Trials: docs/notes/quality.md.
_FIRST_L0 = 64.0
_FIRST_TOKENS = 4096


class JumpReLUConfig(SAEConfig):
    """JumpReLU sparse autoencoder."""

    architecture: Literal["jumprelu"] = "jumprelu"
    """jumprelu: a latent is active where its pre-activation exceeds its own trained threshold."""
    sparsity: Literal["l0", "target", "quadratic", "tanh"] = "l0"
    """What is added to FVU, c being the coefficient. l0: c L0 (DeepMind's). target: c (L0 /
    target_l0 - 1)^2 of the batch's mean L0 (dictionary_learning's). quadratic: c 2 / target_l0
    times each token's (L0 - target_l0)^2 (Gemma Scope 2's in SAELens). tanh: c times the sum of
    tanh(tanh_scale act), beside the squared error of rows of norm sqrt(d_in)
    (Anthropic's, January 2025)."""
    sparsity_coefficient: float | None = Field(default=None, ge=0)
    """Its coefficient; left out 1e-3, with target 1, with tanh 20."""
    sparsity_warmup: float | None = Field(default=None, ge=0, le=1)
    """Part of the steps over which the sparsity's coefficient rises linearly from 0; left out 0.05,
    with tanh 1 (Anthropic's)."""
    target_l0: float | None = Field(default=None, gt=0)
    """Active latents a token that target and quadratic aim at."""
    tanh_scale: float = Field(default=4.0, gt=0)
    """Scale in tanh; 4 is Anthropic's."""
    bandwidth: float | None = Field(default=None, gt=0)
    """Width of the window in which pre-activations give thresholds gradients, for rows of norm
    sqrt(d_in); left out 0.05 (SAELens's, near DeepMind's), with tanh 2 (Anthropic's)."""
    initial_threshold: float | None = Field(default=None, gt=0)
    """Threshold at the start, for rows of norm sqrt(d_in); left out that of initial_l0, with tanh
    0.1 (Anthropic's). SAELens's is 0.01, at which half of the latents are active."""
    initial_l0: float | None = Field(default=None, ge=1)
    """Active latents at the start of the first batch's median token, by one threshold for all
    latents in place of initial_threshold; left out 2 target_l0, with l0 64. A short run that has
    to come down from half of the latents ends with too many. SAEs of train.init_from have theirs.
    """
    ste_to_input: bool | None = None
    """Whether pre-activations in the window get the opposite of the threshold's gradient; left out,
    with tanh alone (Anthropic's)."""
    pre_act_coefficient: float = Field(default=0.0, ge=0)
    """Weight of relu(threshold - pre-activation) beside the squared error of rows of norm
    sqrt(d_in), over the latents that are dead (SAELens's form; Anthropic's, over all, pulls at
    living ones too). Anthropic's weight is 3e-6."""

    @model_validator(mode="after")
    def _aims_at_something(self) -> Self:
        aims = self.sparsity in ("target", "quadratic")
        if aims and self.target_l0 is None:
            raise ValueError(f"sae.sparsity={self.sparsity!r} needs sae.target_l0; give a number")
        if not aims and self.target_l0 is not None:
            raise ValueError(
                f"sae.target_l0={self.target_l0} says nothing of sae.sparsity={self.sparsity!r}; "
                "set sae.sparsity=target, or drop it"
            )
        if self.initial_l0 is not None and self.initial_threshold is not None:
            raise ValueError(
                f"sae.initial_l0={self.initial_l0:g} and sae.initial_threshold="
                f"{self.initial_threshold:g} both say where thresholds begin; drop one"
            )
        return self

    def l0_at_start(self) -> float | None:
        """`initial_l0`, or what it stands for; None where thresholds begin at a given number."""
        given = self.initial_l0
        if given is not None or self.initial_threshold is not None or self.sparsity == "tanh":
            return given
        return _FIRST_L0 if self.target_l0 is None else 2 * self.target_l0

    def from_a_threshold(self) -> Self:
        """This, its start that of versions without `initial_l0` where that is left out."""
        if self.initial_l0 is not None or self.l0_at_start() is None:
            return self
        return self.model_copy(update={"initial_threshold": self.usual("threshold")})

    def usual(self, key: str) -> Any:
        """A key's value, or what is usual with this sparsity loss."""
        given = {
            "coefficient": self.sparsity_coefficient,
            "warmup": self.sparsity_warmup,
            "bandwidth": self.bandwidth,
            "threshold": self.initial_threshold,
            "to_input": self.ste_to_input,
        }[key]
        return getattr(_USUAL[self.sparsity], key) if given is None else given


class JumpReLU(ThresholdCoder):
    """`recon = (pre * (pre > threshold)) @ W_dec + b_dec`, pre = `(x - b_dec) @ W_enc.T + b_enc`;
    see SparseCoder.

    Thresholds themselves are trained, as SAELens does, not their logarithms, which Adam's steps of
    the learning rate hardly move; after each step they are kept positive.
    """

    Config: ClassVar[type[SAEConfig]] = JumpReLUConfig
    roles = ThresholdCoder.roles | {"threshold": "rows"}
    in_data_units = ThresholdCoder.in_data_units | {"threshold"}
    # The paper's: 7e-5, of 8 billion tokens in batches of 4096, and no momentum.
    defaults = TrainDefaults(
        lr=7e-5, lr_steps=2_000_000, adam_betas=(0.0, 0.999), dead_latents="none"
    )
    revivals = frozenset({"auxk", "ghost", "resample", "none"})
    idle = -NEVER
    config: JumpReLUConfig

    def __init__(self, config: SAEConfig, d_in: int, **place: Any) -> None:
        super().__init__(config, d_in, **place)
        self.unit = 1.0
        self.threshold = nn.Parameter(torch.zeros_like(self.b_enc))

    @classmethod
    def autograd_reason(cls, config: SAEConfig) -> str | None:
        """See SparseCoder."""
        assert isinstance(config, JumpReLUConfig)
        if config.pre_act_coefficient:
            return "the pre-activation loss of dead latents has no sparse form"
        return None

    @classmethod
    def scales_encoder(cls, config: SAEConfig) -> bool:
        """See SparseCoder."""
        assert isinstance(config, JumpReLUConfig)
        return config.l0_at_start() is not None

    @classmethod
    def scaled_penalty(cls, config: SAEConfig) -> str | None:
        """See SparseCoder."""
        assert isinstance(config, JumpReLUConfig)
        if config.sparsity == "tanh":
            return "sae.sparsity='tanh'"
        weight = config.pre_act_coefficient
        return f"sae.pre_act_coefficient={weight}" if weight else None

    @property
    def sparsity_warmup(self) -> float:
        """See SparseCoder."""
        return float(self.config.usual("warmup"))

    @property
    def needs_l0(self) -> bool:
        """See SparseCoder."""
        return self.config.sparsity == "target"

    def set_unit(self, unit: float) -> None:
        """See SparseCoder."""
        self.unit = unit

    @torch.no_grad()
    def begin_(self, x: Tensor, y: Tensor, unit: float) -> None:
        """See SparseCoder."""
        super().begin_(x, y, unit)
        self.threshold.fill_(self.config.usual("threshold") * unit)
        if (l0 := self.config.l0_at_start()) is not None:
            self.threshold.clamp_(min=self._reached_by(max(1, round(l0)), x[:_FIRST_TOKENS]))

    def _reached_by(self, number: int, x: Tensor) -> Tensor:
        """The pre-activation that so many latents of the median token of x reach. Collective over
        the shards.
        """
        k, b_dec = min(number, self.d_sae), self.fed_centre()
        own = min(k, self.d_sae_local)
        found, _ = ops.topk_encode(x, self.compute(self.W_enc), self.b_enc, own, b_dec=b_dec)
        everyone = all_gather(found, self.mesh.shard_group, self.mesh.num_shards)
        return everyone.movedim(0, 1).flatten(1).topk(k, dim=1).values[:, -1].median()

    @torch.no_grad()
    def scale_encoder_(self, factor: Tensor) -> None:
        """See SparseCoder: thresholds with it."""
        super().scale_encoder_(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def project_(self) -> tuple[str, ...]:
        """See SparseCoder."""
        self.threshold.clamp_(min=torch.finfo(self.threshold.dtype).tiny)
        return ("threshold",)

    @torch.no_grad()
    def restart_(self, mask: Tensor) -> None:
        """See SparseCoder."""
        super().restart_(mask)
        first = self.threshold.new_tensor(self.config.usual("threshold") * self.unit)
        if self.config.l0_at_start() is not None:
            # Half of all tokens would exceed the least threshold.
            first = torch.maximum(first, mean_of_living(self.threshold, mask, self.mesh))
        self.threshold[mask] = first

    def encode_rows(self, x: Tensor) -> Codes:
        """See SparseCoder."""
        if self.training:
            return super().encode_rows(x)
        return encode_above(self, x, self.threshold)

    def limits(self) -> Tensor:
        """See ThresholdCoder."""
        return self.threshold.detach() - self.bandwidth / 2

    @property
    def bandwidth(self) -> float:
        """In the data's units."""
        return float(self.config.usual("bandwidth")) * self.unit

    def edges(self, batch: Batch) -> Edges | None:
        """See SparseCoder: of losses that are functions of a batch's L0."""
        config, cost = self.config, batch.ramp
        if config.sparsity == "target":
            assert config.target_l0 is not None
            assert batch.l0 is not None
            cost = cost * 2 * (batch.l0 / config.target_l0 - 1) / config.target_l0
        elif config.sparsity != "l0":
            return None
        factor, to_input = config.usual("coefficient") / batch.tokens, config.usual("to_input")
        return Edges(self.threshold, cost, factor, self.bandwidth, to_input)

    def activate(self, found: Codes) -> Codes:
        """See SparseCoder."""
        threshold = self.of_pairs(self.threshold, found, NEVER)
        return found._replace(
            values=jump(found.values, threshold, self.bandwidth, self.config.usual("to_input"))
        )

    @property
    def penalises_dead(self) -> bool:
        """See SparseCoder."""
        return self.config.pre_act_coefficient > 0

    def dead_penalty(self, x: Tensor, rows: Tensor, left_out: Tensor, batch: Batch) -> Tensor:
        """See SparseCoder: the pre-activation loss."""
        pre = self.pre_activations(x, rows, self.b_enc[rows])
        short = (self.threshold[rows] - pre).relu() * ~left_out
        summed = self.over_shards(short.sum()) / batch.unit
        return self.config.pre_act_coefficient * batch.squared * summed

    def penalty(self, x: Tensor, found: Codes, codes: Codes, batch: Batch) -> Tensor:
        """See SparseCoder."""
        config, c = self.config, batch.ramp * float(self.config.usual("coefficient"))
        if config.sparsity == "tanh":
            small = torch.tanh(config.tanh_scale / batch.unit * codes.values).sum()
            return c * batch.squared * self.over_shards(small)
        args = (self.bandwidth, config.usual("to_input"))
        active = step(found.values, self.of_pairs(self.threshold, found, NEVER), *args)
        if config.sparsity == "quadratic":
            assert config.target_l0 is not None
            off = self.of_tokens(active, found, len(x)) - config.target_l0
            return c * 2 / config.target_l0 * off.square().sum() / batch.tokens
        share = self.over_shards(active.sum()) / batch.tokens
        if config.sparsity == "l0":
            return c * share
        assert config.target_l0 is not None
        assert batch.l0 is not None
        # These tokens' share of the whole batch's, with its gradient.
        off = batch.l0 / config.target_l0 - 1
        value = off.square() * len(x) / batch.tokens
        return c * (value + 2 * off / config.target_l0 * (share - share.detach()))
