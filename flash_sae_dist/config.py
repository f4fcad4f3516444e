"""Strict, frozen configuration: what may be in a config file, section by section.

One file describes a whole run; each verb reads the sections it needs. A field's docstring is its
help text. `config_file.py` reads files and tells mistakes.
"""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase
from os.path import expanduser
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]
# A URL has no `~` in front and stays what it is.
Folder = Annotated[Text, AfterValidator(expanduser)]
# What numpy, torch and the kernels all take, with steps added to it.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Rows of the dictionary are numbered in 32 bits.
Latents = Annotated[int, Field(gt=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["auto", "float64", "float32", "bfloat16"]
ExportFormat = Literal["sae_lens", "sparsify"]


class UserError(ValueError):
    """Something that the user can set right, told in one sentence; a verb ends with it, not with a
    traceback.
    """


class ConfigError(UserError):
    """A mistake in a config or on the command line, found before any work: the key, the value, the
    fix.
    """


class StrictModel(BaseModel):
    """A section: unknown keys and wrong types are refused, values never change after birth."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_types(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, int) and abs(value) >= 2**63:
            raise PydanticCustomError("too_large", "a whole number has to fit 64 bits")
        return _from_yaml(value, cls.model_fields[str(info.field_name)].annotation)


def _from_yaml(value: Any, kind: Any) -> Any:
    """YAML has lists and reads 1e-4 as a string; strict fields are tuples and floats."""
    # A section's lists are tuples by the time that the section itself is looked at.
    if isinstance(value, list | tuple):
        return tuple(_from_yaml(v, kind) for v in value)
    if isinstance(value, dict):
        return {name: _from_yaml(v, kind) for name, v in value.items()}
    if isinstance(value, str) and _holds_float(kind) and _is_exponent_number(value):
        return float(value)
    return value


def _holds_float(kind: Any) -> bool:
    return kind is float or any(_holds_float(part) for part in get_args(kind))


def _is_exponent_number(text: str) -> bool:
    mantissa, e, exponent = text.lower().partition("e")
    return bool(e) and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit()


class ModelConfig(StrictModel):
    """The language model whose activations are read."""

    name: Text
    """Hub name or local folder of a Hugging Face model, or `package:NAME` for a model that an
    installed Python package carries.
    """
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    gguf_file: str | None = None
    """File inside `name` when the weights are in GGUF form."""
    task: Literal["auto", "causal-lm", "masked-lm"] = "auto"
    """Head used to measure the loss recovered; auto reads the model's own config."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Weights of the language model; auto is bfloat16 where the device computes in it, else
    float32. On GPUs its products are bfloat16 in any case (autocast).
    """


class TextConfig(StrictModel):
    """The text that is run through the model."""

    source: Literal["hub", "files", "pydoc"]
    """hub: a Hugging Face dataset; files: local .txt, .jsonl or .parquet; pydoc: the manual pages
    inside Python itself.
    """
    name: Text | None = None
    """Dataset name on the hub, or a local dataset folder (source: hub)."""
    subset: str | None = None
    """Dataset configuration (source: hub)."""
    split: str = "train"
    """Dataset split (source: hub)."""
    column: str = "text"
    """Column or JSON key that holds the text."""
    paths: tuple[str, ...] = ()
    """Files, glob patterns or fsspec URLs of files (source: files)."""
    streaming: bool = True
    """Read a hub dataset as a stream instead of downloading it whole."""

    @model_validator(mode="after")
    def _source_has_its_input(self) -> Self:
        if self.source == "hub" and self.name is None:
            raise ValueError(
                "text.name is missing: source 'hub' needs a dataset name, such as "
                "'monology/pile-uncopyrighted'"
            )
        if self.source == "files" and not self.paths:
            raise ValueError(
                "text.paths is empty: source 'files' needs at least one file or pattern"
            )
        return self


class CacheConfig(StrictModel):
    """What is written to the activation store, and how."""

    store: Folder
    """Folder or fsspec URL of the Zarr store."""
    hookpoints: tuple[str, ...] = Field(min_length=1)
    """Module names, wildcards allowed: `model.layers.*` are all blocks, `model.layers.*.mlp` their
    MLPs (`*` is one part of a name, `**` any number); add `:input` to read a module's input instead
    of its output.
    """
    num_tokens: int = Field(gt=0)
    """Rows to store for each hookpoint; fewer if the text ends first."""
    context_length: int = Field(default=256, gt=0)
    """Tokens a sequence."""
    batch_sequences: int = Field(default=16, gt=0)
    """Sequences a forward pass."""
    drop_special_tokens: bool = True
    """Leave out positions of BOS, EOS and other special tokens, whose activations are outliers."""
    shard_mib: float = Field(default=128, gt=0, le=2**20)
    """Size of one file of the store, written whole by one process; 64-256 suits disks and object
    stores.
    """
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored activations."""
    seed: Seed = 0
    """Seed of the shuffle of sequences and rows."""


class SAEConfig(StrictModel):
    """Shape of a TopK sparse autoencoder."""

    k: Latents
    """Active latents a token."""
    d_sae: Latents | None = None
    """Latents over all shards; give this or expansion_factor."""
    expansion_factor: float | None = Field(default=None, gt=0, lt=2**31)
    """d_sae as a multiple of the hookpoint's width."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if (self.d_sae is None) == (self.expansion_factor is None):
            raise ValueError(
                f"give one of sae.d_sae and sae.expansion_factor, not d_sae={self.d_sae} with "
                f"expansion_factor={self.expansion_factor}"
            )
        if self.d_sae is not None and self.k > self.d_sae:
            raise ValueError(
                f"sae.k={self.k} exceeds sae.d_sae={self.d_sae}; lower k or widen the dictionary"
            )
        return self

    def width(self, d_in: int) -> int:
        """Latents for a hookpoint of width d_in. Raises ConfigError where k does not fit, or the
        latents exceed what is numbered in 32 bits.
        """
        d_sae = self.d_sae or round((self.expansion_factor or 0) * d_in)
        if d_sae >= 2**31:
            raise ConfigError(
                f"sae.expansion_factor={self.expansion_factor} gives {d_sae} latents at width "
                f"{d_in}, more than 2**31 - 1; lower it"
            )
        if self.k > d_sae:
            raise ConfigError(
                f"sae.k={self.k} exceeds the {d_sae} latents of "
                f"sae.expansion_factor={self.expansion_factor} at width {d_in}; "
                "lower k or raise expansion_factor"
            )
        return d_sae


class TrainConfig(StrictModel):
    """How an SAE is trained from a store."""

    hookpoint: str | None = None
    """Hookpoint of the store to train on; needed by `train`, set by the grid for its jobs."""
    num_tokens: int = Field(gt=0)
    """Tokens to train on; more than the store holds means several epochs."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Tokens a step, over all processes that train this SAE."""
    lr: float | None = Field(default=None, gt=0)
    """Peak learning rate; left out it is 2e-4 / sqrt(d_sae / 2**14)."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Steps of linear warm-up."""
    decay_fraction: float = Field(default=0.2, ge=0, le=1)
    """Last part of the steps over which the learning rate falls linearly to zero."""
    adam_betas: tuple[Beta, Beta] = (0.9, 0.999)
    """Adam's decay rates."""
    adam_eps: float = Field(default=6.25e-10, gt=0)
    """Adam's epsilon; small because the normalised loss has small gradients (OpenAI's value)."""
    step: Literal["auto", "fused", "plain"] = "auto"
    """fused: sparse gradients and Adam in one pass, no dense gradient; plain: autograd and
    torch.optim.Adam, the same arithmetic. auto: fused, but plain where replicas, grad_clip or
    micro_batches need it."""
    grad_clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient over all latents (plain step)."""
    micro_batches: int = Field(default=1, gt=0)
    """Parts that a batch is run in, their gradients added up (plain step)."""
    adam_mode: Literal["exact", "lazy"] = "exact"
    """exact: dense Adam's arithmetic; lazy (fused only): only latents that fired are moved, as
    torch.optim.SparseAdam does, which is faster and changes the arithmetic."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Adam's moments; bfloat16 (fused only) is rounded stochastically and halves their memory."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay a step of a running average of the weights (fused only); the SAE that is written is
    then the average, its decoder rows at unit norm."""
    dead_latents: Literal["auxk", "ghost", "resample", "none"] = "auxk"
    """What revives latents that stopped firing: OpenAI's AuxK loss, Anthropic's ghost gradients
    (fused only), resampling once every dead_after_tokens, or nothing."""
    aux_coef: float = Field(default=1 / 32, ge=0)
    """Weight of the AuxK or ghost loss."""
    k_aux: Latents | None = None
    """Dead latents that AuxK or ghost gradients use a token; left out, half the width."""
    dead_after_tokens: int = Field(default=10_000_000, gt=0)
    """Tokens without firing, counted over all processes, after which a latent is dead. Dead ones
    are looked for every 100 steps."""
    precision: Precision = "auto"
    """Arithmetic of matmuls and gathers; master weights are float32 (float64 for float64). auto:
    bfloat16 on GPUs, else float32.
    """
    num_shards: int | None = Field(default=None, gt=0)
    """Processes that share one SAE's latents; left out, all of them."""
    num_replicas: int = Field(default=1, gt=0)
    """Copies of the sharded SAE that split each batch."""
    seed: Seed = 0
    """Seed of the order of the data."""
    log_every: int = Field(default=10, gt=0)
    """Steps between log lines; the device is read only then."""
    checkpoint_every: int = Field(default=1000, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    """Newest checkpoints kept."""

    @model_validator(mode="after")
    def _options_fit_the_step(self) -> Self:
        options = {"adam_mode": "exact", "moment_dtype": "float32", "ema_decay": None}
        wanted = {k: getattr(self, k) for k, v in options.items() if getattr(self, k) != v}
        if self.dead_latents == "ghost":
            wanted["dead_latents"] = "ghost"
        needed = self._plain_options()
        if wanted and not self.uses_fused_step:
            key, value = next(iter(wanted.items()))
            other = f"train.{needed[0]}" if needed else "train.step"
            raise ValueError(
                f"train.{key}={value!r} needs the fused step, which {other} rules out; drop one"
            )
        if self.step == "fused" and needed:
            key = needed[0]
            raise ValueError(
                f"train.{key}={getattr(self, key)!r} needs the plain step; "
                "set train.step=plain, or drop it"
            )
        return self

    def _plain_options(self) -> list[str]:
        defaults = {"num_replicas": 1, "grad_clip": None, "micro_batches": 1}
        return [key for key, value in defaults.items() if getattr(self, key) != value]

    @property
    def uses_fused_step(self) -> bool:
        """The one place where the step is chosen."""
        return self.step == "fused" or (self.step == "auto" and not self._plain_options())


# One launch has one mesh, and the hookpoints have a key of their own.
_SHARED_BY_A_GRID = ("hookpoint", "num_shards", "num_replicas")


class GridConfig(StrictModel):
    """Many SAEs from one store: every hookpoint with every combination of values."""

    hookpoints: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Hookpoints of the store, wildcards as in cache.hookpoints; `*` alone are all."""
    values: dict[str, tuple[Any, ...]] = {}
    """Lists of values by dotted key of the sections sae and train, such as `sae.k: [16, 32]`."""

    @field_validator("values")
    @classmethod
    def _keys_exist(cls, values: dict[str, tuple[Any, ...]]) -> dict[str, tuple[Any, ...]]:
        fields = {f"sae.{n}": field for n, field in SAEConfig.model_fields.items()} | {
            f"train.{n}": field
            for n, field in TrainConfig.model_fields.items()
            if n not in _SHARED_BY_A_GRID
        }
        known = list(fields)
        for key, choices in values.items():
            if key not in known:
                raise ValueError(
                    f"grid.values has no use for key {key!r}{nearest_name(key, known)}"
                )
            if not choices:
                raise ValueError(f"grid.values: {key!r} is an empty list; give at least one value")
        typed = {key: _from_yaml(list(v), fields[key].annotation) for key, v in values.items()}
        for key, choices in typed.items():
            for at, choice in enumerate(choices):
                if choice in choices[:at]:
                    raise ValueError(
                        f"grid.values: {key!r} holds {choice!r} twice, one SAE trained two times; "
                        "drop one"
                    )
        return typed


class EvaluateConfig(StrictModel):
    """What is measured on finished SAEs."""

    num_tokens: int = Field(default=65_536, gt=0)
    """Stored rows for FVU, cosine, L0, latents that never fired, and densities."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored rows a pass."""
    loss_sequences: int = Field(default=64, ge=0)
    """Sequences of text for the loss recovered; 0 leaves it out and the model is never loaded."""


class ExportConfig(StrictModel):
    """Files for other libraries."""

    formats: tuple[ExportFormat, ...] = get_args(ExportFormat)
    """Formats to write."""
    directory: Folder | None = None
    """Where to write; left out, `<output>/export`."""


class Config(StrictModel):
    """A whole run."""

    output: Folder
    """Folder of everything that is trained, evaluated and exported; a path, not a URL."""
    model: ModelConfig | None = None
    text: TextConfig | None = None
    cache: CacheConfig | None = None
    sae: SAEConfig | None = None
    train: TrainConfig | None = None
    grid: GridConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    store: Folder | None = None
    """Store to train from and to measure on; left out, `cache.store`."""
    trackers: tuple[str, ...] = ("tensorboard",)
    """Trackers of accelerate, by name: tensorboard, wandb, trackio, ...; an empty list logs to
    files alone.
    """

    @model_validator(mode="after")
    def _folders_are_paths(self) -> Self:
        for key, folder in (("output", self.output), ("export.directory", self.export.directory)):
            if folder is not None and "://" in folder:
                raise ValueError(
                    f"{key}={folder!r} is a URL; give a folder (only stores and text may be URLs)"
                )
        return self

    def store_path(self) -> str:
        """The store that training reads. Raises ConfigError where none is named."""
        if self.store is not None:
            return self.store
        if self.cache is not None:
            return self.cache.store
        raise ConfigError(
            "store is missing: name the activation store, as store: PATH or under cache.store"
        )

    def need(self, *sections: str, verb: str) -> None:
        """Raises ConfigError naming the first section that a verb needs and the file lacks."""
        for section in sections:
            if getattr(self, section) is None:
                raise ConfigError(
                    f"section {section!r} is missing: `{verb}` needs it; "
                    "see configs/quickstart.yaml"
                )


def match_names(pattern: str, names: list[str]) -> list[str]:
    """The module names that a pattern means, in their order.

    `*` is (part of) one part of a dotted name, so `layers.*` are the blocks and not all that is
    inside them; `**` is any number of parts; `?` and `[...]` are as in a shell.
    """
    return [name for name in names if _matches(pattern.split("."), name.split("."))]


def _matches(pattern: list[str], name: list[str]) -> bool:
    if not pattern:
        return not name
    if pattern[0] == "**":
        return any(_matches(pattern[1:], name[n:]) for n in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], pattern[0]) and _matches(pattern[1:], name[1:])


def nearest_name(word: str, known: list[str]) -> str:
    """The end of an error sentence: the nearest known name, or all of them when none is near."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
