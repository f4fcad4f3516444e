"""The section train: the keys of all engines, and those of each."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import Beta, Folder, Hookpoint, Hookpoints, Latents, OneOf, Seed, StrictModel, shown

Precision = Literal["auto", "float64", "float32", "bfloat16"]
Preload = Literal["auto", "none", "host", "device"]


def _num_shards(value: Any) -> Any:
    if value is None or value == "auto" or (type(value) is int and value > 0):
        return value
    raise ValueError(
        f"train.num_shards={shown(value)} is no number of processes; write a whole number greater "
        "than 0, or auto"
    )


Optimizer = Literal["adam", "adamw", "muon", "signum"]
Schedule = Literal[
    "warmup_stable_decay", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
    "inverse_sqrt", "constant",
]  # fmt: skip
# Keys of one schedule alone.
_OF_SCHEDULES = {
    "decay_fraction": "warmup_stable_decay",
    "schedule_cycles": "cosine_with_restarts",
    "min_lr_rate": "cosine_with_min_lr",
}


NumShards = Annotated[int | Literal["auto"], BeforeValidator(_num_shards)]
STEP_IS_GONE = (
    "train.step is gone: train.step=plain is now train.engine=autograd, and train.step=fused is "
    "train.engine=fused"
)


class TrainConfig(StrictModel):
    """How an SAE is trained: the keys that every engine has."""

    hookpoint: Hookpoints | None = None
    """Hookpoint of the store (of cache.hookpoints) to train on; needed by `train`, set by the grid
    for its jobs. Of a crosscoder several, joined by +, such as `layers.4+layers.8`: it reads and
    gives the rows of all of them, those of each divided by their root mean square (or as
    train.normalize says)."""
    target: Hookpoint | None = None
    """Hookpoint that is reconstructed from train.hookpoint, row by row: the SAE is a transcoder,
    such as from `layers.8.mlp:input` to `layers.8.mlp`. Left out, the hookpoint itself. Rows of
    both are divided by their root mean squares while training, whatever train.normalize says."""
    source: Literal["store", "stream"] = "store"
    """store: rows of an activation store; stream: rows of the model itself, which runs on the text
    while SAEs are trained, as the sections model, text and cache say. No store is needed, and
    every process runs the model on its own share of the text, once for all hookpoints and SAEs."""
    loss: Literal["fvu", "ce", "kl"] = "fvu"
    """fvu: the reconstruction's error; ce, kl: the model goes on with the reconstruction, and the
    loss is its cross-entropy, or the divergence of its predictions from its own (end-to-end; Braun
    et al. 2024), mostly to fine-tune an SAE (init_from). Needs source stream and one process for
    each SAE; batches are whole sequences, two forward passes and one backward for each SAE."""
    fvu_coef: float = Field(default=0.0, ge=0)
    """Weight of FVU beside the model's loss (loss ce or kl)."""
    buffer_tokens: int = Field(default=2**18, gt=0)
    """Tokens that each process mixes (source: stream): the rows of so many, of every hookpoint, are
    kept in the memory of its device, and batches are drawn from over half of them."""
    num_tokens: int = Field(gt=0)
    """Tokens to train on; more than the store holds, or the text has, means several epochs."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens a step, over all processes that train this SAE."""
    optimizer: Optimizer = "adam"
    """adam; adamw: Adam with decoupled weight decay of the matrices; muon: orthogonalised momentum
    for the matrices, Adam for the biases; signum: schedule-free sign descent with momentum 0.95,
    whose average is the SAE that is written, decoder rows at unit norm (sparsify's default until
    1.3). muon needs dense gradients: engine auto is autograd with it."""
    weight_decay: float | None = Field(default=None, ge=0)
    """Decoupled weight decay of the matrices (adamw, muon): before each step they are multiplied by
    1 - lr * weight_decay; biases are not. Left out, 0.01 for adamw (torch's), 0 for muon
    (sparsify's)."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; left out, the architecture's: for those of the TopK family
    2e-4 / sqrt(d_sae / 2**14) (Gao et al. 2024) and 7e-5 for jumprelu (its paper's) times what
    lr_rule says, 5e-5 for gated (dictionary_learning's) and relu (Anthropic's of April 2024). With
    other optimizers sparsify's: 2e-3 for muon, 5e-3 / sqrt(d_sae / 2**14) for signum. A run that
    goes on for longer keeps the rate that it began with."""
    lr_rule: Literal["width", "budget"] | None = None
    """How lr, where it is left out, goes with the length of a run. budget: in runs of fewer than
    300,000 steps sqrt(300,000 / steps) times the TopK family's, 8 at the most; of jumprelu
    sqrt(2,000,000 / steps) times its own, at most the TopK family's. width: the same for any number
    of steps. Left out, budget for SAEs that begin from random weights with Adam, where short runs
    end at a far lower error (docs/notes/quality.md), else width."""
    schedule: Schedule = "warmup_stable_decay"
    """The learning rate after its warm-up, by the names of transformers: warmup_stable_decay stays
    and falls linearly to zero over the last part of the steps (decay_fraction); linear and cosine
    fall to zero over all steps that are left, cosine_with_restarts several times
    (schedule_cycles), cosine_with_min_lr to a part of the peak (min_lr_rate); inverse_sqrt falls
    with the root of the steps; constant stays (transformers' constant_with_warmup)."""
    schedule_cycles: int = Field(default=4, gt=0)
    """How many times the learning rate falls to zero (schedule cosine_with_restarts)."""
    min_lr_rate: float = Field(default=0.1, ge=0, lt=1)
    """Part of the peak that is left at the end (schedule cosine_with_min_lr)."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Steps of linear warm-up; left out, 1,000 or a twentieth of all, whichever is fewer. A run
    that goes on for longer keeps those that it began with."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Last part of the steps over which the learning rate falls linearly to zero (schedule
    warmup_stable_decay)."""
    adam_betas: tuple[Beta, Beta] | None = None
    """Adam's decay rates; left out, the architecture's: [0, 0.999] for jumprelu (its paper's)
    and gated (dictionary_learning's), else [0.9, 0.999]."""
    adam_eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon; small because the normalised loss has small gradients (OpenAI's value).
    Biases are in the data's units: their learning rate is lr times the root mean square of the
    hookpoint's activations and their epsilon is divided by it, so training does not depend on the
    data's scale."""
    normalize: Literal["none", "unit_mean_square", "expected_norm"] = "none"
    """unit_mean_square: rows are divided by the root mean square of the hookpoint's activations
    while training, which the SAE that is written undoes: it reads rows as they are stored. Training
    does not depend on the scale either way; this keeps its numbers near 1. expected_norm: they are
    divided so that their mean norm, of the first batch, is sqrt(d_in), as SAELens's
    expected_average_only_in."""
    subtract_mean: bool = False
    """The hookpoint's mean activation is subtracted from rows while training, before they are
    divided; the b_dec that is written has it added. The mean is the store's own; where there is
    none, as of a stream, the first batch's."""
    engine: Literal["auto", "fused", "autograd", "deepspeed"]
    """What makes a step; it decides which other keys there are."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all latents, the biases' times the root mean square of the
    activations (see adam_eps)."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts that a batch is run in, their gradients added up."""
    dead_latents: Literal["auxk", "ghost", "resample", "none"] | None = None
    """What revives latents that stopped firing: OpenAI's AuxK loss, Anthropic's ghost gradients
    (engine fused alone), resampling once every dead_after_tokens, or nothing; left out, the
    architecture's: auxk for those of the TopK family, none for others, whose dead latents have no
    positive pre-activations that AuxK could use."""
    aux_coef: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK or ghost loss."""
    k_aux: Latents | None = None
    """Dead latents that AuxK or ghost gradients use a token; left out, half the width."""
    dead_after_tokens: int = Field(default=10_000_000, gt=0)
    """A latent that has not fired for more tokens than this, over all processes, is dead. Dead ones
    are looked for every 100 steps."""
    precision: Precision = "auto"
    """Arithmetic of matmuls and gathers; master weights are float32 (float64 for float64). auto:
    bfloat16 on GPUs, else float32.
    """
    num_shards: NumShards | None = None
    """Processes that share one SAE's latents; left out, all of them. auto: as many as train
    fastest in the memory that there is, by the planner's figures (`flash-sae plan`), with as many
    replicas as go with them where num_replicas is left out, too."""
    num_replicas: int = Field(default=1, gt=0)
    """Copies of the sharded SAE that split each batch."""
    encoder_scale: Literal["unit", "least_squares"] | None = None
    """Norm of the encoder's rows at the start, where few latents are active then (the TopK family;
    jumprelu by sae.initial_l0). unit: 1, as the decoder's. least_squares: the one at which the
    first batch's reconstruction is neither too long nor too short, in the sense of least squares.
    Left out, least_squares for such SAEs that begin from random weights, else unit."""
    init_from: Folder | None = None
    """SAE to begin from in place of random weights: a file or folder of any format that
    `flash-sae convert` knows, or owner/name of the hub. The section sae says its architecture and
    width; k may be another."""
    seed: Seed = 0
    """Seed of the initial weights and of the order of the data."""
    holdout: float = Field(default=0.01, ge=0, lt=1)
    """Largest share of the store's rows that is never trained on: whole documents, chosen by a hash
    of their number, so that every job on a store leaves out the same; 100,000 rows at most. Of a
    stream, all documents whose hash is in the first part of so much, of which a store holds out the
    first ones. 0 for jobs begun by versions without this key."""
    preload: Preload = "auto"
    """Where rows are kept once they have been read: in host or GPU (device) memory, or none. auto:
    where more than one epoch is read, on the GPU if they take a quarter of its free memory at the
    most; those of a remote store else on the host. The batches are the same, bit for bit."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines, whose values are read a log later: no step waits for them."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints. They are copied to the host's memory and written from there while
    training goes on; one that falls due while the last is being written waits for it."""
    checkpoint_minutes: float | None = Field(default=None, gt=0)
    """Minutes between checkpoints by the clock of the first process, beside those of
    checkpoint_every; left out, none."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""
    rendezvous_timeout_s: float = Field(default=600, ge=1, le=86_400)
    """Seconds within which all processes of a launch (of any verb) have to come together."""
    heartbeat_s: float = Field(default=45, ge=1, le=86_400)
    """Seconds after which a process of a launch (of any verb) that is not heard of is taken for
    gone, and all others end. One that compiles, loads or waits is heard of; raise it where C code
    keeps Python from running for longer.
    """

    @model_validator(mode="before")
    @classmethod
    def _no_step(cls, data: Any) -> Any:
        if isinstance(data, dict) and "step" in data:
            raise ValueError(STEP_IS_GONE)
        if isinstance(data, dict) and data.get("k_aux") == 0 and data["k_aux"] is not False:
            raise ValueError(
                "train.k_aux=0 revives no latents; set train.dead_latents=none, or leave k_aux out"
            )
        return data

    @model_validator(mode="after")
    def _one_lr(self) -> Self:
        if self.lr_rule == "budget" and self.lr is not None:
            raise ValueError(
                f"train.lr_rule='budget' says nothing beside train.lr={self.lr:g}; drop one"
            )
        return self

    @model_validator(mode="after")
    def _schedule_has_its_keys(self) -> Self:
        for key, schedule in _OF_SCHEDULES.items():
            if self.schedule != schedule and self._is_set(key):
                raise ValueError(
                    f"train.{key}={getattr(self, key)} says nothing of train.schedule="
                    f"{self.schedule!r}; drop one"
                )
        return self

    def _is_set(self, key: str) -> bool:
        """Whether a key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].default)

    @model_validator(mode="after")
    def _optimizer_has_its_keys(self) -> Self:
        idle = []
        if self.optimizer == "signum":
            # Its average stands for a schedule, and a sign has no size.
            idle = ["schedule", "decay_fraction", "grad_clip", "adam_betas", "adam_eps"]
        if self.optimizer not in ("adamw", "muon"):
            idle.append("weight_decay")
        for key in idle:
            if self._is_set(key):
                raise ValueError(
                    f"train.{key}={shown(getattr(self, key))} says nothing of train.optimizer="
                    f"{self.optimizer!r}; drop one"
                )
        return self

    @model_validator(mode="after")
    def _loss_has_its_keys(self) -> Self:
        if self.loss == "fvu":
            if self.fvu_coef:
                raise ValueError(
                    f"train.fvu_coef={self.fvu_coef} stands beside train.loss=ce or kl, not 'fvu'; "
                    "drop one"
                )
            return self
        key = f"train.loss={self.loss!r}"
        if self.source != "stream":
            raise ValueError(f"{key} runs the model on whole texts; set train.source=stream")
        for name, why in (
            ("target", "is of SAEs, not of transcoders"),
            ("buffer_tokens", "mixes no rows: it takes whole sequences"),
            ("micro_batches", "takes a batch whole; lower train.batch_tokens instead"),
        ):
            if self._is_set(name):
                raise ValueError(f"{key} {why}; drop train.{name}={shown(getattr(self, name))}")
        return self

    @model_validator(mode="after")
    def _source_has_its_keys(self) -> Self:
        usual = type(self).model_fields["buffer_tokens"].default
        if self.source == "store" and self.buffer_tokens != usual:
            raise ValueError(
                f"train.buffer_tokens={self.buffer_tokens} says nothing of a store; drop it, or "
                "set train.source=stream"
            )
        if self.source == "stream" and self.num_shards == "auto":
            raise ValueError(
                "train.num_shards='auto' looks at a store, which train.source=stream has not; give "
                "a number"
            )
        if self.source == "stream" and self.preload in ("host", "device"):
            raise ValueError(
                f"train.preload={self.preload!r} says nothing of train.source=stream, which reads "
                "no store; drop it"
            )
        return self


class FusedTrainConfig(TrainConfig):
    """How an SAE is trained.

    With the keys of the fused engine.
    """

    engine: Literal["auto", "fused"] = "auto"
    """fused: sparse gradients and Adam in one pass, no dense gradient; autograd: PyTorch's autograd
    and torch.optim.Adam, the same arithmetic; deepspeed: autograd's, under DeepSpeed's ZeRO. auto:
    fused, or autograd where an architecture needs it (a log line then says so)."""
    adam_mode: Literal["exact", "lazy"] = "exact"
    """exact: dense Adam's arithmetic; lazy: only latents that fired are moved, as
    torch.optim.SparseAdam does, which is faster and changes the arithmetic."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Adam's moments; bfloat16 is rounded stochastically and halves their memory."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of a running average of the weights; the SAE that is written is
    then the average, its decoder rows at unit norm."""

    @model_validator(mode="after")
    def _suits_the_optimizer(self) -> Self:
        if self.optimizer == "adamw" and self.adam_mode == "lazy":
            raise ValueError(
                "train.optimizer='adamw' decays all rows at every step, which train.adam_mode="
                "'lazy' leaves alone; drop one"
            )
        for key in ("adam_mode", "moment_dtype", "ema_decay"):
            if self.optimizer == "signum" and self._is_set(key):
                raise ValueError(
                    f"train.{key}={shown(getattr(self, key))} is of Adam, not of train.optimizer="
                    "'signum', which keeps one moment and an average of its own; drop one"
                )
        return self


class _DenseTrainConfig(TrainConfig):
    """The keys of the engines that run on autograd."""

    @model_validator(mode="after")
    def _no_ghost_gradients(self) -> Self:
        if self.dead_latents == "ghost":
            raise ValueError(
                "train.dead_latents='ghost' needs the fused engine, not "
                f"train.engine={self.engine!r}; drop one"
            )
        return self


class AutogradTrainConfig(_DenseTrainConfig):
    """How an SAE is trained.

    With the keys of the autograd engine.
    """

    engine: Literal["autograd"]
    """PyTorch's autograd and an optimizer over dense gradients, such as torch.optim.Adam."""
    moment_dtype: Literal["float32", "8bit"] = "float32"
    """Adam's moments. 8bit: those of the matrices are kept in 8 bits with a scale of 256 elements
    each, by bitsandbytes (optimizer adam or adamw, rows of a width that 256 divides)."""

    @model_validator(mode="after")
    def _eight_bit_is_adams(self) -> Self:
        if self.moment_dtype == "8bit":
            for key, none in (("optimizer", ("muon", "signum")), ("precision", ("float64",))):
                if (given := getattr(self, key)) in none:
                    raise ValueError(
                        f"train.moment_dtype='8bit' is of adam and adamw in float32, not of "
                        f"train.{key}={given!r}; drop one"
                    )
        return self


class DeepSpeedTrainConfig(_DenseTrainConfig):
    """How an SAE is trained.

    With the keys of the deepspeed engine.
    """

    engine: Literal["deepspeed"]
    """PyTorch's autograd, with torch.optim.Adam under DeepSpeed's ZeRO."""
    deepspeed_config: Folder | None = None
    """JSON file with a section zero_optimization in DeepSpeed's words, such as
    configs/deepspeed/zero2_offload.json: the stage of ZeRO (1 or 2), whether Adam and its moments
    are on the host, sizes of buckets. What keys of train decide, it may not say otherwise. Left
    out, ZeRO-1 on the device."""

    @model_validator(mode="after")
    def _adam_alone(self) -> Self:
        if self.loss != "fvu":
            raise ValueError(
                f"train.loss={self.loss!r} is not of train.engine='deepspeed'; set "
                "train.engine=autograd"
            )
        if self.optimizer != "adam":
            raise ValueError(
                f"train.optimizer={self.optimizer!r} is not of train.engine='deepspeed', whose "
                "ZeRO splits Adam; set train.engine=autograd, or drop train.optimizer"
            )
        return self

    @model_validator(mode="after")
    def _no_float64(self) -> Self:
        if self.precision == "float64":
            raise ValueError(
                "train.precision='float64' is more than the float32 of ZeRO's master weights; set "
                "train.precision=float32, or train.engine=autograd"
            )
        return self


ENGINES: dict[str, type[TrainConfig]] = {
    "auto": FusedTrainConfig,
    "fused": FusedTrainConfig,
    "autograd": AutogradTrainConfig,
    "deepspeed": DeepSpeedTrainConfig,
}
ENGINE_CHOICE = OneOf("train", "engine", "auto", lambda: ENGINES)
