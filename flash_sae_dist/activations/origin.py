"""What a store's rows are made of: the model's files, the tokenizer, the text."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from ..config.data import ModelConfig, TextConfig, TextSource
from ..config.run import RunConfig
from ..identity import checksums, digest, plain, stamp
from .language_model import (
    LanguageModel,
    folder_or_name,
    model_commit,
    model_dtype,
    weights_checksum,
)
from .text import TokenTable
from .text_files import matches

logger = logging.getLogger(__name__)
# To be raised when a hookpoint comes to mean another tensor: what is read of which call of a pass.
HOOK_SEMANTICS = 1
# What activations of a model are, of whatever text: an SAE is measured on these rows alone.
MODEL_PARTS = (
    *("model weights", "model sample", "model config", "model code", "tokenizer", "hooks"),
    *("cache.context_length", "cache.drop_special_tokens", "cache.skip_first_tokens"),
    "cache.max_norm_ratio",
)
_ROW_PARTS = (
    *("context_length", "batch_sequences", "drop_special_tokens", "skip_first_tokens"),
    *("dtype", "seed", "max_norm_ratio"),
)
# Keys that older stores did not know: a stamp has them where they are set.
_LATER_TEXT_KEYS = ("tokens_column", "messages_column", "weight", "revision")
# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
# Keys of a model's config.json that change no activation.
_WITHOUT_EFFECT = {
    *("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "_commit_hash"),
    *("architectures", "id2label", "label2id"),
}
_WITHOUT_EFFECT_ON_ADAPTERS = {
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type"),
    *("auto_mapping", "lora_dropout", "init_lora_weights"),
}
# Its ids tell normaliser, splitting and merges, which no vocabulary does.
_PROBE = "The  quick brown-fox\n\tjumps over 1234.56 lazy dogs; naïve Œuvre 東京 don't word7 word8"


def model_folder(cfg: ModelConfig, commit: str | None = None) -> Path | None:
    """Where the model's files lie on this machine; None where they are not found."""
    return _folder(folder_or_name(cfg.name), cfg.gguf_file or "config.json", commit or cfg.revision)


def _folder(source: str, file: str, revision: str | None = None) -> Path | None:
    """The folder on this machine that holds a file of a folder or of the hub's source."""
    from huggingface_hub import try_to_load_from_cache

    if os.path.isdir(source):
        return Path(source)
    try:
        found = try_to_load_from_cache(source, file, revision=revision)
    except ValueError:
        return None
    if not isinstance(found, str):
        return None
    return Path(found.removesuffix(file))


def _adapter_folder(cfg: ModelConfig) -> Path | None:
    assert cfg.adapter is not None
    return _folder(folder_or_name(cfg.adapter, "model.adapter"), _ADAPTER[-1])


def _weight_files(folder: Path, gguf_file: str | None) -> list[Path] | None:
    if gguf_file:
        return [folder / gguf_file] if (folder / gguf_file).is_file() else None
    name = next((name for name in _WEIGHTS if (folder / name).is_file()), None)
    if name is None:
        return None
    files = [folder / name]
    if name.endswith(".index.json"):
        try:
            parts = set(json.loads(files[0].read_text())["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError):
            return None
        files = [folder / part for part in sorted(parts)]
    files += [folder / name for name in _ADAPTER if (folder / name).is_file()]
    return files if all(file.is_file() for file in files) else None


def model_parts(cfg: ModelConfig, commit: str | None = None) -> dict[str, Any] | None:
    """Checksums of weights and code, and the config that matters, from the model's files alone;
    None where they are not found.
    """
    folder = model_folder(cfg, commit)
    files = _weight_files(folder, cfg.gguf_file) if folder else None
    if folder is None or files is None:
        return None
    found = sorted(pair for file in files for pair in checksums(file))
    config = _read_config(folder / "config.json", _WITHOUT_EFFECT)
    if cfg.adapter is not None:
        adapter = _adapter_folder(cfg)
        files = [f for name in _ADAPTER[:2] if adapter and (f := adapter / name).is_file()]
        if adapter is None or not files:
            return None
        found += sorted([f"adapter {name}", crc] for f in files for name, crc in checksums(f))
        config["adapter"] = _read_config(adapter / _ADAPTER[-1], _WITHOUT_EFFECT_ON_ADAPTERS)
    if cfg.quantization is not None:
        config["quantization"] = cfg.quantization
    code = sorted(folder.glob("*.py")) if "auto_map" in config else []
    return {
        "model weights": digest(found),
        "model config": config,
        "model code": digest([[f.name, *checksums(f)] for f in code]),
    }


def _read_config(file: Path, without: set[str]) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    # peft writes sets of names, in an order of chance.
    sorted_ = {k: sorted(v) if k == "target_modules" and isinstance(v, list) else v
               for k, v in config.items()}  # fmt: skip
    return {k: v for k, v in sorted_.items() if k not in without}


def tokenizer_digest(tokenizer: Any) -> str:
    """Vocabulary, special tokens, and how it splits a sentence: what decides a text's ids, in
    whatever files and by whatever version it is written.
    """
    special = {
        key: getattr(tokenizer, f"{key}_token_id", None)
        for key in ("bos", "eos", "cls", "sep", "pad", "mask", "unk")
    }
    ids = tokenizer([_PROBE], add_special_tokens=False, verbose=False)["input_ids"][0]
    return digest([sorted(tokenizer.get_vocab().items()), special, [int(i) for i in ids]])


def text_digest(table: TokenTable) -> str:
    """Of the token ids, of what the model sees and what is stored."""
    sha = hashlib.sha256()
    for values in (table.ids, table.attention, table.keep, table.document, table.position):
        sha.update(str(list(values.shape)).encode())
        for start in range(0, len(values), 4096):
            sha.update(np.ascontiguousarray(values[start : start + 4096]).tobytes())
    return sha.hexdigest()[:24]


def loaded_parts(cfg: ModelConfig, lm: LanguageModel) -> dict[str, Any]:
    """`model_parts` of a loaded model, and of its tokenizer. A sample of the loaded weights stands
    for the files' where those are not found.
    """
    found = model_parts(cfg, model_commit(lm))
    if found is None:
        found = {"model sample": f"{model_dtype(lm)} {weights_checksum(lm):08x}"}
    return {
        **found,
        "model task": lm.task,
        "model dtype": model_dtype(lm),
        "tokenizer": tokenizer_digest(lm.tokenizer),
        "hooks": HOOK_SEMANTICS,
    }


def row_parts(config: RunConfig) -> dict[str, Any]:
    """The keys that decide rows by their own values."""
    assert config.cache is not None
    data = config.cache.model_dump(mode="json")
    return {f"cache.{key}": data[key] for key in _ROW_PARTS}


def content_stamp(config: RunConfig) -> str | None:
    """A checksum of size, times and inode of every file that model, tokenizer and text are read
    from; None where one is not found. Where it is the same, so is what lies there.
    """
    assert config.model is not None
    assert config.text is not None
    try:
        folder = model_folder(config.model)
        if folder is None:
            return None
        files = sorted(f for f in folder.iterdir() if f.is_file())
        found = [[f.name, *stamp(f)] for f in files]
        if config.model.gguf_file:
            found.append(["gguf", *stamp(folder / config.model.gguf_file)])
        if config.model.adapter is not None:
            if (adapter := _adapter_folder(config.model)) is None:
                return None
            found += [["adapter", *stamp(f)] for f in sorted(adapter.iterdir()) if f.is_file()]
        if config.model.quantization is not None:
            found.append([config.model.quantization])
        return digest([found, _text_stamp(config.text)])
    except (OSError, ValueError, ImportError) as e:
        logger.debug("no stamp: %s", e)
        return None


def text_is_here(cfg: TextSource) -> bool:
    """Whether a text can be read again without the hub."""
    if isinstance(cfg, TextConfig) and cfg.mixture:
        return all(text_is_here(part) for part in cfg.mixture)
    return cfg.source != "hub" or Path(str(cfg.name)).expanduser().is_dir()


def _text_stamp(cfg: TextSource) -> list[Any]:
    about: list[Any] = [cfg.source, cfg.column, cfg.name, cfg.subset, cfg.split]
    about += [[key, v] for key in _LATER_TEXT_KEYS if (v := getattr(cfg, key, None)) is not None]
    if isinstance(cfg, TextConfig) and cfg.mixture:
        return [*about, [_text_stamp(part) for part in cfg.mixture]]
    if cfg.source == "pydoc":
        return [*about, sys.version]
    if cfg.source == "hub":
        folder = Path(str(cfg.name)).expanduser()
        files = sorted(f for f in folder.rglob("*") if f.is_file()) if folder.is_dir() else []
        return about + [stamp(f) for f in files]
    for pattern in cfg.paths:
        fs, found = matches(pattern)
        local = isinstance(fs, fsspec.implementations.local.LocalFileSystem)
        for name in found:
            about.append(stamp(Path(name)) if local else plain(str(fs.ukey(name))))
    return about
