"""Tiny random language models with a word tokenizer, and configs that use them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from flash_sae_dist.activations import text
from flash_sae_dist.config.data import TextConfig
from flash_sae_dist.files import read_json, write_json


def token_table(
    cfg: TextConfig, tokenizer: Any, *, num_rows: int, skip_first_tokens: int = 0, **how: Any
) -> text.TokenTable:
    """All of a text's sequences in one table."""
    making = text.Making(cfg, tokenizer, skip_first_tokens=skip_first_tokens, **how)
    return text.token_table(making, num_rows=num_rows)


def held_out_table(
    cfg: TextConfig, tokenizer: Any, *, after_documents: int, num_sequences: int, **how: Any
) -> text.TokenTable:
    """Sequences behind the documents that a store holds."""
    return text.held_out_table(
        text.Making(cfg, tokenizer, **how),
        after_documents=after_documents,
        num_sequences=num_sequences,
    )


WORDS = [f"word{i}" for i in range(50)]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
BERT_SPECIAL = {"cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}


def save_tokenizer(folder: Path, special: dict[str, str]) -> int:
    """Writes a tokenizer of whole words; returns its vocabulary's size."""
    vocabulary = {word: i for i, word in enumerate([*special.values(), *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return len(vocabulary)


def save_llama(folder: Path, width: int = 16, layers: int = 3) -> Path:
    """A causal model of random weights."""
    vocabulary = save_tokenizer(folder, SPECIAL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_bert(folder: Path) -> Path:
    """A masked model of random weights."""
    vocabulary = save_tokenizer(
        folder, {"unk_token": "<unk>", "pad_token": "<pad>", **BERT_SPECIAL}
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    return folder


def save_text(file: Path, documents: int = 60, seed: int = 0) -> Path:
    """A .jsonl of documents of 5 to 60 words."""
    rng = random.Random(seed)
    lines = []
    for _ in range(documents):
        words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(5, 60)))
        lines.append('{"text": "' + words + '"}')
    file.write_text("\n".join(lines) + "\n")
    return file


def config_data(root: Path, **cache: Any) -> dict[str, Any]:
    """Plain data of a config over a tiny llama and its text in root."""
    if not (root / "model").exists():
        save_llama(root / "model")
        save_text(root / "text.jsonl")
    return {
        "output": str(root / "run"),
        "model": {"name": str(root / "model"), "dtype": "float32"},
        "text": {"source": "files", "paths": [str(root / "text.jsonl")]},
        "cache": {
            "store": str(root / "store.zarr"),
            "hookpoints": ["model.layers.0", "model.layers.1.mlp"],
            "num_tokens": 1500,
            "context_length": 24,
            "batch_sequences": 4,
            "dtype": "float32",
            **cache,
        },
        "sae": {"k": 4, "d_sae": 64},
        "train": {
            "hookpoint": "model.layers.0",
            "num_tokens": 6400,
            "batch_tokens": 64,
            "lr": 1e-3,
            "warmup_steps": 5,
            "log_every": 1,
            "checkpoint_every": 10,
            "dead_after_tokens": 640,
        },
        "grid": {"values": {"sae.k": [2, 4]}},
        "evaluate": {"num_tokens": 512, "batch_tokens": 128, "loss_sequences": 4},
        "trackers": [],
    }


def assert_same_rows(rows: torch.Tensor, others: torch.Tensor) -> None:
    """The same rows as often, in any order, but for roundings."""
    assert rows.shape == others.shape
    # Each row stands for the first one of `others` that is the same.
    first, own = ((torch.cdist(r, others) < 1e-4) for r in (rows, others))
    assert first.any(dim=1).all()
    found, want = (near.int().argmax(dim=1).sort().values for near in (first, own))
    assert torch.equal(found, want)


def amend(file: Path, change: Callable[[str], str]) -> None:
    """Changes a sealed JSON file's text, which then holds its new checksum."""
    write_json(file, json.loads(change(json.dumps(read_json(file)))))


def write_config(file: Path, data: dict[str, Any]) -> Path:
    """Writes a config as YAML."""
    file.write_text(yaml.safe_dump(data))
    return file
