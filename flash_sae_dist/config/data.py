"""The sections of what is cached: model, text and cache."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from .base import ConfigError, Folder, Seed, StrictModel, Text, shown


def _placement(value: Any) -> Any:
    places = value.values() if isinstance(value, dict) else ()
    if value in (None, "auto", "balanced") or (
        places and all(isinstance(p, int | str) and not isinstance(p, bool) for p in places)
    ):
        return value
    raise ValueError(
        f"model.device_map={shown(value)} is no placement; write auto, balanced, or the device of "
        "each module, such as {model.layers.0: 0, model.layers.1: 1}"
    )


def _norm_ratio(value: Any) -> Any:
    ratios = list(value.values()) if isinstance(value, dict) else [value]
    names = list(value) if isinstance(value, dict) else []
    if value is None or (
        ratios
        and all(isinstance(r, int | float) and 1 < r < math.inf for r in ratios)
        and all(isinstance(name, str) and name for name in names)
    ):
        return value
    raise ValueError(
        f"cache.max_norm_ratio={shown(value)} leaves out rows by no ratio; write a number above 1, "
        "such as 10, or one for each of some hookpoints, such as {model.layers.3: 10}"
    )


NormRatio = Annotated[float | dict[str, float], BeforeValidator(_norm_ratio)]
Placement = Annotated[str | dict[str, int | str], BeforeValidator(_placement)]


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
    adapter: Text | None = None
    """Local folder or hub name of a LoRA adapter (peft), which is merged into the weights."""
    quantization: Literal["8bit", "4bit"] | None = None
    """Quantise the weights when they are loaded (bitsandbytes, on GPUs). A model that is stored
    quantised (GPTQ, AWQ, bitsandbytes) loads as its own config says.
    """
    device_map: Placement | None = None
    """Spread the model over the GPUs of this process: evenly, by accelerate's own placement (auto,
    balanced), or by module name, such as {model.layers.0: 0}. Left out, it is on one device.
    """
    trust_remote_code: bool = False
    """Run Python code that comes with the model's files, with all your rights; set it only where
    you have read that code.
    """


class TextSource(StrictModel):
    """One source of text."""

    source: Literal["hub", "files", "pydoc", "mixture"]
    """hub: a Hugging Face dataset, or a folder that datasets' save_to_disk wrote; files: .txt,
    .jsonl, .csv or .parquet, also as .gz, .bz2, .xz or .zst; pydoc: the manual pages inside Python
    itself; mixture: several of these.
    """
    name: Text | None = None
    """Dataset name on the hub, or a local dataset folder (source: hub)."""
    subset: str | None = None
    """Dataset configuration (source: hub)."""
    revision: Text | None = None
    """Branch, tag or commit of a dataset of the hub. A branch moves: a commit makes sure that a
    launch that goes on reads the text that the first one read (source: hub).
    """
    split: str = "train"
    """Dataset split (source: hub)."""
    column: str = "text"
    """Column or JSON key that holds the text."""
    tokens_column: Text | None = None
    """Column or JSON key that holds lists of token ids, which are taken as they stand, in place of
    text.
    """
    messages_column: Text | None = None
    """Column or JSON key that holds chats (lists of {role, content}), which become text by the chat
    template of the model's tokenizer.
    """
    paths: tuple[str, ...] = ()
    """Files, glob patterns or fsspec URLs of files (source: files)."""
    streaming: bool = True
    """Read a hub dataset as a stream instead of downloading it whole."""

    _AT: ClassVar[str] = "text."

    @model_validator(mode="after")
    def _source_has_its_input(self) -> Self:
        if self.source == "hub" and self.name is None:
            raise ValueError(
                f"{self._AT}name is missing: source 'hub' needs a dataset name, such as "
                "'monology/pile-uncopyrighted'"
            )
        if self.source == "files" and not self.paths:
            raise ValueError(
                f"{self._AT}paths is empty: source 'files' needs at least one file or pattern"
            )
        if self.source not in ("hub", "mixture") and self.revision is not None:
            raise ValueError(
                f"{self._AT}revision={shown(self.revision)} is that of a dataset of the hub, not "
                f"of source {self.source!r}; drop it"
            )
        columns = [c for c in ("tokens_column", "messages_column") if getattr(self, c) is not None]
        if columns and self.source == "pydoc":
            raise ValueError(f"{self._AT}{columns[0]}: source 'pydoc' is plain text; drop it")
        columns += ["column"] if self.column != _default("column") else []
        if len(columns) > 1:
            raise ValueError(
                f"{self._AT}{columns[0]} and {self._AT}{columns[1]} both name what is read; drop "
                "one of them"
            )
        return self


def _default(key: str) -> object:
    return TextSource.model_fields[key].default


class TextPart(TextSource):
    """One source of text.mixture."""

    weight: float = Field(default=1.0, gt=0)
    """This part's share of the tokens, beside the other parts' weights."""

    _AT: ClassVar[str] = "text.mixture: "

    @model_validator(mode="after")
    def _is_no_mixture(self) -> Self:
        if self.source == "mixture":
            raise ValueError("text.mixture: a part cannot be a mixture itself; list its parts")
        return self


class TextConfig(TextSource):
    """The text that is run through the model."""

    mixture: tuple[TextPart, ...] | None = None
    """Sources with the keys of `text` and a weight, such as [{source: hub, name: a/b, weight: 3},
    {source: files, paths: [c.jsonl]}]; documents are drawn so that tokens come in proportion to the
    weights. A part that ends leaves its share to the others (source: mixture).
    """

    @model_validator(mode="after")
    def _mixture_has_parts(self) -> Self:
        if self.source != "mixture":
            if self.mixture is not None:
                raise ValueError(
                    f"text.mixture needs text.source=mixture, not {self.source!r}; change the one "
                    "or drop the other"
                )
            return self
        if not self.mixture:
            raise ValueError(
                "text.mixture is empty: source 'mixture' needs parts, such as "
                "[{source: pydoc}, {source: files, paths: [a.txt], weight: 2}]"
            )
        for key in sorted(TextSource.model_fields.keys() - {"source"}):
            if getattr(self, key) != _default(key):
                raise ValueError(
                    f"text.{key} says nothing of a mixture; move it into the parts of text.mixture"
                )
        return self


class CacheConfig(StrictModel):
    """Which activations are stored, and how.

    With train.source=stream: which ones are trained on.
    """

    store: Folder | None = None
    """Folder of the Zarr store, or its URL in an object store: s3://, gs:// or az://. `cache` needs
    it."""
    hookpoints: tuple[str, ...] = Field(min_length=1)
    """Module names, wildcards allowed: `model.layers.*` are all blocks, `model.layers.*.mlp` their
    MLPs (`*` is one part of a name, `**` any number); add `:input` to read a module's input instead
    of its output.
    """
    num_tokens: int | None = Field(default=None, gt=0)
    """Rows to store for each hookpoint, fewer if the text ends first; `cache` needs it. With
    train.source=stream an epoch ends after about as many; left out, where the text does."""
    context_length: int = Field(default=256, gt=0)
    """Tokens a sequence."""
    batch_sequences: int = Field(default=16, gt=0)
    """Sequences a forward pass."""
    drop_special_tokens: bool = True
    """Leave out positions of BOS, EOS and other special tokens, whose activations are outliers."""
    skip_first_tokens: int = Field(default=0, ge=0)
    """Leave out so many first positions of every sequence, whose norms are often outliers."""
    max_norm_ratio: NormRatio | None = None
    """Leave out rows whose norm exceeds so many times the median, such as 10; a mapping has ratios
    for some hookpoints, wildcards as in `hookpoints`, such as {model.layers.3: 10} (the last that
    names a hookpoint counts). The median is that of the first rows, each hookpoint's own. A row
    that is left out at one hookpoint is left out at all: training, evaluation and statistics pass
    over its place, which holds zeros. `flash-sae store info` tells how many they are.
    """
    shard_mib: float = Field(default=128, gt=0, le=2**20)
    """Size of one file of the store, written whole by one process; 64-256 suits disks and object
    stores.
    """
    memory_gib: float = Field(default=8, gt=0)
    """Host memory of a process, in GiB, for rows on their way to the store. With so many hookpoints
    that three shards of all of them would not fit, shards are smaller."""
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"
    """Type of the stored activations; int8 has a scale a row and half the size of bfloat16."""
    seed: Seed = 0
    """Seed of the shuffle of sequences and rows."""

    def rows_to_store(self) -> int:
        """num_tokens. Raises ConfigError where it was left out."""
        return self._needed("num_tokens")  # type: ignore[no-any-return]

    def path(self) -> str:
        """store. Raises ConfigError where it was left out."""
        return self._needed("store")  # type: ignore[no-any-return]

    def _needed(self, key: str) -> Any:
        if (value := getattr(self, key)) is None:
            raise ConfigError(
                f"key 'cache.{key}' is missing: only train.source=stream goes without; add it"
            )
        return value
