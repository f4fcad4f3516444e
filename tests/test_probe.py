"""Models as people have them: each stored row is that of the token beside it, or a sentence says
why it cannot be, before any text is read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from flash_sae_dist.activations.language_model import (
    capture_activations,
    load_language_model,
    replace_activations,
    resolve_hookpoints,
)
from flash_sae_dist.activations.model_loss import check_has_loss
from flash_sae_dist.activations.probe import check_ids, probe, probe_ids
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.data import ModelConfig
from tests.tiny_model import BERT_SPECIAL, SPECIAL, save_tokenizer

CPU = torch.device("cpu")
V = 60
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DECODER = SMALL | {"num_key_value_heads": 2, "max_position_embeddings": 64}
MASKED = {"unk_token": "<unk>", "pad_token": "<pad>", **BERT_SPECIAL}


def made(folder: Path, kind: str, config: Any, special: dict[str, str] = SPECIAL) -> Path:
    torch.manual_seed(0)
    getattr(hf, kind)(config).save_pretrained(folder)
    save_tokenizer(folder, special)
    return folder


def loaded(folder: Path, **keys: Any) -> Any:
    return load_language_model(ModelConfig(name=str(folder), dtype="float32", **keys), CPU)


def test_a_module_that_runs_several_times_is_refused(tmp_path: Path) -> None:
    config = hf.AlbertConfig(**SMALL, embedding_size=8, max_position_embeddings=64)
    lm = loaded(made(tmp_path / "m", "AlbertForMaskedLM", config, MASKED))
    (name,) = resolve_hookpoints(lm.model, ("**.albert_layers.0",))
    with pytest.raises(ConfigError, match="runs 2 times in one forward pass"):
        probe(lm, ["albert.encoder.embedding_hidden_mapping_in", name], 16)
    assert probe(lm, ["albert.encoder.embedding_hidden_mapping_in"], 16)


def t5(folder: Path) -> Any:
    config = hf.T5Config(
        vocab_size=V, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    return loaded(made(folder, "T5ForConditionalGeneration", config))


def bart(folder: Path) -> Any:
    config = hf.BartConfig(
        vocab_size=V, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        max_position_embeddings=40, pad_token_id=3, bos_token_id=0, eos_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    return loaded(made(folder, "BartForConditionalGeneration", config))


@pytest.mark.parametrize("build", [t5, bart])
def test_of_two_streams_of_ids_the_encoders_are_the_texts(tmp_path: Path, build: Any) -> None:
    lm = build(tmp_path / "m")
    part = "block" if build is t5 else "layers"
    assert probe(lm, [f"encoder.{part}.0", f"encoder.{part}.1"], 40) == {
        f"encoder.{part}.0": 16,
        f"encoder.{part}.1": 16,
    }
    with pytest.raises(ConfigError, match="no part of the encoder"):
        probe(lm, [f"encoder.{part}.0", f"decoder.{part}.0"], 16)
    with pytest.raises(ConfigError, match=r"evaluate\.loss_sequences=0"):
        check_has_loss(lm)
    ids = probe_ids(lm, 16)
    alone = capture_activations(lm, [f"encoder.{part}.0"], ids, ids > -1)[f"encoder.{part}.0"]
    both = capture_activations(lm, [f"encoder.{part}.1", f"encoder.{part}.0"], ids, ids > -1)[
        f"encoder.{part}.0"
    ]
    assert torch.equal(alone, both)


def roberta(positions: int) -> Any:
    return hf.RobertaConfig(**SMALL, max_position_embeddings=positions, pad_token_id=1)


def test_robertas_reserved_positions(tmp_path: Path) -> None:
    lm = loaded(made(tmp_path / "m", "RobertaForMaskedLM", roberta(34), MASKED))
    assert probe(lm, ["roberta.encoder.layer.0"], 32)
    for length in (33, 34, 40):
        with pytest.raises(ConfigError, match=rf"context_length={length} exceeds .* 32 positions"):
            probe(lm, ["roberta.encoder.layer.0"], length)


def test_what_the_model_raises_is_told_with_the_length_that_it_takes(tmp_path: Path) -> None:
    lm = loaded(made(tmp_path / "m", "LlamaForCausalLM", hf.LlamaConfig(**DECODER)))

    def short(module: nn.Module, args: Any) -> None:
        if args[0].shape[1] > 20:
            raise IndexError("index out of range in self")

    lm.model.model.embed_tokens.register_forward_pre_hook(short)
    with pytest.raises(ConfigError, match=r"context_length=40: .*IndexError.*set it to 20 or less"):
        probe(lm, ["model.layers.0"], 40)


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    config = hf.LlamaConfig(**DECODER | {"vocab_size": 40})
    lm = loaded(made(tmp_path / "m", "LlamaForCausalLM", config))
    with pytest.raises(ConfigError, match=r"ids up to 53, .* 0 \.\. 39 alone"):
        probe(lm, ["model.layers.0"], 16)
    with pytest.raises(ConfigError, match=r"the token 47 \('word43'\)"):
        check_ids(lm, 47)
    check_ids(lm, 39)


def test_xlnet_has_no_limit_of_positions(tmp_path: Path) -> None:
    config = hf.XLNetConfig(vocab_size=V, d_model=16, n_layer=2, n_head=2, d_inner=32)
    lm = loaded(made(tmp_path / "m", "XLNetLMHeadModel", config))
    # Its layers' tensors are [tokens, batch, width].
    with pytest.raises(ConfigError, match=r"'transformer\.layer\.0' gives a tensor of shape"):
        probe(lm, ["transformer.layer.0"], 24)


def test_a_model_that_sees_images_is_a_causal_model(tmp_path: Path) -> None:
    seeing = hf.SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        image_size=28, patch_size=14,
    )  # fmt: skip
    text = hf.Gemma3TextConfig(**DECODER, head_dim=8)
    config = hf.Gemma3Config(text_config=text, vision_config=seeing, mm_tokens_per_image=4)
    lm = loaded(made(tmp_path / "m", "Gemma3ForConditionalGeneration", config))
    assert lm.causal
    check_has_loss(lm)
    assert probe(lm, ["model.language_model.layers.0"], 16)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    told = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    with pytest.raises(ConfigError, match=r"adapter of some/base, no model; set model.adapter"):
        loaded(tmp_path)


def shifting(model: Any) -> None:
    """Embeds each token a place later, as decoders of translation models do."""
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: (args[0].roll(1, 1),))


def late(model: Any) -> None:
    """The same behind the embedding, where no ids can be seen."""
    model.model.embed_tokens.register_forward_hook(lambda _, args, out: out.roll(1, 1))


@pytest.mark.parametrize(("change", "word"), [(shifting, "changes the token ids"), (late, "row")])
def test_rows_beside_another_token_are_refused(tmp_path: Path, change: Any, word: str) -> None:
    lm = loaded(made(tmp_path / "m", "LlamaForCausalLM", hf.LlamaConfig(**DECODER)))
    assert probe(lm, ["model.layers.1"], 16) == {"model.layers.1": 16}
    change(lm.model)
    with pytest.raises(ConfigError, match=word):
        probe(lm, ["model.layers.1"], 16)


def test_evaluate_replaces_what_cache_reads(tmp_path: Path) -> None:
    lm = t5(tmp_path / "m")
    ids = probe_ids(lm, 16)
    seen = capture_activations(lm, ["encoder.block.1"], ids, ids > -1)["encoder.block.1"]
    with replace_activations(lm, "encoder.block.0", torch.zeros_like):
        changed = capture_activations(lm, ["encoder.block.1"], ids, ids > -1)["encoder.block.1"]
    assert not torch.equal(seen, changed)
