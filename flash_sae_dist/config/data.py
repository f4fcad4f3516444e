"""The sections of what is cached: model, text and cache."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .base import Folder, Seed, StrictModel, Text


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
    trust_remote_code: bool = False
    """Run Python code that comes with the model's files, with all your rights; set it only where
    you have read that code.
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
    memory_gib: float = Field(default=8, gt=0)
    """Host memory of a process, in GiB, for rows on their way to the store. With so many hookpoints
    that three shards of all of them would not fit, shards are smaller."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the stored activations."""
    seed: Seed = 0
    """Seed of the shuffle of sequences and rows."""
