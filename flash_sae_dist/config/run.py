"""The sections and keys of a run that no architecture or engine changes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from .base import ConfigError, Folder, Hookpoints, Latents, StrictModel, from_yaml, nearest_name
from .data import CacheConfig, ModelConfig, TextConfig
from .train import STEP_IS_GONE

ExportFormat = Literal[
    "flash_sae_dist",
    "sae_lens",
    "sparsify",
    "dictionary_learning",
    "llamascopium",
    "gemma_scope",
    "gemma_scope_2",
    "circuit_tracer",
    "openai",
    "qwen_scope",
]


class GridConfig(StrictModel):
    """Many SAEs from one store: every hookpoint with every combination of values."""

    hookpoints: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Hookpoints of the store, wildcards as in cache.hookpoints; `*` alone are all."""
    values: dict[str, tuple[Any, ...]] = {}
    """Lists of values by dotted key of the sections sae and train, such as `sae.k: [16, 32]`: an
    SAE for every combination of them."""
    points: tuple[dict[str, Any], ...] = ()
    """A list of values that go together, such as `- {sae.d_sae: 4096, train.lr: 1e-3}`: each is
    combined with every combination of grid.values."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Combinations to leave out, such as `- {sae.k: 64, hookpoint: layers.0}`: all that have each
    of these values. A list means any of its values, a hookpoint may have wildcards."""
    overrides: dict[str, dict[str, Any]] = {}
    """By hookpoint, wildcards allowed, values or lists of values in the place of those of
    grid.values, such as `layers.0: {sae.k: [8, 16], train.lr: 1e-4}`."""

    def typed(
        self,
        kinds: Mapping[str, Any],  # the annotation of each key that may vary
    ) -> Self:
        """The grid with its values as those keys' types read YAML. Raises ValueError for an unknown
        key, an empty list, a value that stands there twice or a key that stands in two places.
        """
        values = _typed_lists("grid.values", self.values, kinds)
        points = tuple(
            {k: v for k, (v,) in _typed_lists("grid.points", _single(p), kinds).items()}
            for p in self.points
        )
        overrides = {
            hookpoint: _typed_lists(f"grid.overrides.{hookpoint}", _lists(of), kinds)
            for hookpoint, of in self.overrides.items()
        }
        in_points = {key for point in points for key in point}
        for place, keys in [
            ("grid.values", values),
            *(("grid.overrides", o) for o in overrides.values()),
        ]:
            for key in in_points & keys.keys():
                raise ValueError(f"grid.points and {place} both have {key!r}; drop one")
        for point in points:
            if point.keys() != in_points:
                raise ValueError(
                    f"grid.points: {point} lacks {sorted(in_points - point.keys())[0]!r}, which "
                    "another point has; give each point the same keys"
                )
        kinds = {k: v for k, v in kinds.items() if k in self.varied_keys()} | {"hookpoint": str}
        exclude = tuple(_typed_lists("grid.exclude", _lists(e), kinds) for e in self.exclude)
        update = {"values": values, "points": points, "overrides": overrides, "exclude": exclude}
        return self.model_copy(update=update)

    def varied_keys(self) -> set[str]:
        """Every key that has values here."""
        return {key for of in (self.values, *self.points, *self.overrides.values()) for key in of}

    def all_values(self, key: str) -> tuple[Any, ...]:
        """Every value that a key has in any SAE of the grid, as `typed` left them; none where it is
        not varied."""
        lists = [of.get(key, ()) for of in (self.values, *self.overrides.values())]
        return tuple(v for part in lists for v in part) + tuple(
            point[key] for point in self.points if key in point
        )


def _single(values: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    return {key: (value,) for key, value in values.items()}


def _lists(values: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Lists as they are, of anything else a list of one."""
    return {k: tuple(v) if isinstance(v, list | tuple) else (v,) for k, v in values.items()}


def _typed_lists(
    place: str, values: Mapping[str, tuple[Any, ...]], kinds: Mapping[str, Any]
) -> dict[str, tuple[Any, ...]]:
    if "train.step" in values:
        raise ValueError(f"{place}: {STEP_IS_GONE}")
    for key, choices in values.items():
        if key not in kinds:
            raise ValueError(f"{place} has no use for key {key!r}{nearest_name(key, list(kinds))}")
        if not choices:
            raise ValueError(f"{place}: {key!r} is an empty list; give at least one value")
    typed = {key: from_yaml(list(v), kinds[key]) for key, v in values.items()}
    for key, choices in typed.items():
        for at, choice in enumerate(choices):
            if choice in choices[:at]:
                raise ValueError(
                    f"{place}: {key!r} holds {choice!r} twice, one SAE trained two times; drop one"
                )
    return typed


class EvaluateConfig(StrictModel):
    """What is measured on finished SAEs."""

    rows: Literal["held_out", "all"] = "held_out"
    """held_out: of the store that an SAE was trained on, the rows that train.holdout left out;
    where there are none, all, as a warning says. all: all rows. Of another store always all."""
    saes: tuple[Folder, ...] = ()
    """SAEs to measure in place of those under output: files or folders of any format that
    `flash-sae convert` knows, or owner/name of the hub. On the command line SAE=PATH adds one.
    Without a store the model itself gives the rows, as the sections model, text and cache say."""
    hookpoint: Hookpoints | None = None
    """Hookpoint of evaluate.saes whose files do not tell it, or tell another library's name."""
    k: Latents | None = None
    """k of evaluate.saes whose files do not tell it (Qwen-Scope's)."""
    num_tokens: int = Field(default=65_536, gt=0)
    """Stored rows for FVU, cosine, L0, latents that never fired, and densities."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored rows a pass."""
    loss_sequences: int = Field(default=64, ge=0)
    """Sequences of text for the cross-entropy and the KL divergence recovered; 0 leaves them out
    and the model is never loaded."""


class FeaturesConfig(StrictModel):
    """What is shown of each latent."""

    saes: tuple[str, ...] = Field(default=("*",), min_length=1)
    """SAEs to look at, by their folders under output, such as `model.layers.8/k=32`; `*` is any
    text."""
    latents: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """Numbers of the latents to look at; left out, all."""
    num_tokens: int = Field(default=10_000_000, gt=0)
    """Stored rows to read, from the first one on."""
    batch_tokens: int = Field(default=4096, gt=0)
    """Stored rows a pass."""
    top_examples: int = Field(default=16, gt=0)
    """Rows with a latent's largest activations that are shown."""
    quantile_examples: int = Field(default=4, ge=0)
    """Rows that are shown of each fifth of a latent's activations, drawn by chance."""
    context_tokens: int = Field(default=12, ge=0)
    """Tokens that are shown before each example, and as many behind it."""
    output_tokens: int = Field(default=10, ge=0)
    """Output tokens that are raised most, and lowered most, by a latent; 0 leaves them out, and
    only the model's tokenizer is loaded."""
    nearest: int = Field(default=10, ge=0)
    """Latents with the nearest decoder rows that are shown."""


class ExportConfig(StrictModel):
    """Files for other libraries."""

    formats: tuple[ExportFormat, ...] = ("sae_lens", "sparsify")
    """Formats to write: docs/formats.md says who reads them, and what each can hold."""
    directory: Folder | None = None
    """Where to write; left out, `<output>/export`."""


class StoreCacheConfig(StrictModel):
    """A disk that keeps what is read of a store in an object store."""

    folder: Folder
    """Folder on a disk of each host, which its processes and several jobs may share."""
    gib: float = Field(gt=0)
    """Largest size of all that lies there, in GiB; what was read longest ago makes room."""


class RunConfig(StrictModel):
    """A run without its sections sae, train and grid; `training.job.Config` is the whole."""

    output: Folder
    """Folder of everything that is trained, evaluated and exported; a path, not a URL."""
    model: ModelConfig | None = None
    text: TextConfig | None = None
    cache: CacheConfig | None = None
    evaluate: EvaluateConfig = EvaluateConfig()
    features: FeaturesConfig = FeaturesConfig()
    export: ExportConfig = ExportConfig()
    store: Folder | None = None
    """Store to train from and to measure on; left out, `cache.store`."""
    store_cache: StoreCacheConfig | None = None
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

    def names_store(self) -> bool:
        """Whether there is a store to read."""
        return self.store is not None or (self.cache is not None and self.cache.store is not None)

    def store_path(self) -> str:
        """The store that training reads. Raises ConfigError where none is named."""
        if self.store is not None:
            return self.store
        if self.cache is not None and self.cache.store is not None:
            return self.cache.store
        raise ConfigError(
            "store is missing: name the activation store, as store: PATH or under cache.store "
            "(SAEs of train.source=stream, too, are measured on one; `flash-sae cache` makes it)"
        )

    def need(self, *sections: str, verb: str) -> None:
        """Raises ConfigError naming the first section that a verb needs and the file lacks."""
        for section in sections:
            if getattr(self, section) is None:
                raise ConfigError(
                    f"section {section!r} is missing: `{verb}` needs it; "
                    "see configs/quickstart.yaml"
                )
