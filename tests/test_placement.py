"""Adapters are merged, quantised and spread models loaded as told, or one sentence says why not."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.quantizers.auto import AutoQuantizationConfig

from flash_sae_dist.activations import placement
from flash_sae_dist.activations.language_model import (
    load_language_model,
    replace_activations,
    run_model,
    weights_checksum,
)
from flash_sae_dist.activations.origin import content_stamp, loaded_parts, model_parts
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.data import ModelConfig
from flash_sae_dist.identity import difference
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import config_data, save_llama

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("placement")
    save_llama(root / "model")
    save_llama(root / "wide", width=32)
    return root


def save_adapter(base: Path, folder: Path, seed: int = 0, **options: Any) -> Path:
    """A LoRA adapter of random weights."""
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(base)
    options = {"target_modules": ["q_proj", "v_proj"], "r": 2, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(seed)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    adapted.save_pretrained(folder)
    return folder


def config(root: Path, **keys: Any) -> ModelConfig:
    return ModelConfig(**{"name": str(root / "model"), "dtype": "float32", **keys})


def test_an_adapter_is_merged(root: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    folder = save_adapter(root / "model", tmp_path / "adapter")
    plain = load_language_model(config(root), CPU)
    merged = load_language_model(config(root, adapter=str(folder)), CPU)
    names = [name for name, _ in plain.model.named_modules()]
    assert [name for name, _ in merged.model.named_modules()] == names, "the same hookpoints"
    expected = peft.PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(root / "model"), folder
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        ours, theirs = merged.model(ids).logits, expected(input_ids=ids).logits
        assert (ours - theirs).abs().max() < 1e-4
        assert (ours - plain.model(ids).logits).abs().max() > 1e-3
    assert weights_checksum(merged) != weights_checksum(plain)


def test_identity_covers_an_adapter(root: Path, tmp_path: Path) -> None:
    paths = [save_adapter(root / "model", tmp_path / f"a{seed}", seed) for seed in (0, 0, 1)]
    other = save_adapter(root / "model", tmp_path / "alpha", lora_alpha=3)
    first, again, seeded = (model_parts(config(root, adapter=str(p))) for p in paths)
    scaled, plain = model_parts(config(root, adapter=str(other))), model_parts(config(root))
    assert first is not None
    assert seeded is not None
    assert scaled is not None
    assert plain is not None
    assert first == again, "the same content under another path"
    assert str(difference(first, seeded)).startswith("model weights=")
    assert "model config adapter" in str(difference(first, scaled))
    assert difference(plain, first) is not None
    assert model_parts(config(root, adapter=str(tmp_path))) is None
    lm = load_language_model(config(root, adapter=str(paths[0])), CPU)
    assert loaded_parts(config(root, adapter=str(paths[0])), lm).items() >= first.items()


def test_the_stamp_covers_an_adapter(tmp_path: Path) -> None:
    data = config_data(tmp_path)
    folder = save_adapter(tmp_path / "model", tmp_path / "adapter")
    plain = content_stamp(parse_config(data))
    data["model"]["adapter"] = str(folder)
    adapted = content_stamp(parse_config(data))
    (folder / "adapter_config.json").write_text(
        (folder / "adapter_config.json").read_text().replace("{", "{ ", 1)
    )
    assert len({plain, adapted, content_stamp(parse_config(data)), None}) == 4


def test_adapters_that_do_not_fit_are_told(root: Path, tmp_path: Path) -> None:
    folder = save_adapter(root / "model", tmp_path / "adapter")
    with pytest.raises(ConfigError, match=r"model\.adapter=.* cannot be merged into model\.name="):
        load_language_model(config(root, name=str(root / "wide"), adapter=str(folder)), CPU)
    with pytest.raises(ConfigError, match=r"model\.adapter='./nowhere' is no folder"):
        load_language_model(config(root, adapter="./nowhere"), CPU)
    with pytest.raises(ConfigError, match=r"model\.adapter=.* cannot be merged .*LoRA adapter"):
        load_language_model(config(root, adapter=str(root / "model")), CPU)
    # One that names modules of every layer but holds weights of some.
    import safetensors.torch as st

    file = folder / "adapter_model.safetensors"
    weights = st.load_file(file)
    st.save_file({k: v for k, v in weights.items() if "layers.0." not in k}, file)
    with pytest.raises(ConfigError, match="missing adapter keys"):
        load_language_model(config(root, adapter=str(folder)), CPU)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Hides a package."""
    find = importlib.util.find_spec

    def hide(name: str) -> None:
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda n, *a: None if n == name else find(n, *a)
        )

    return hide


def test_missing_packages_are_told(root: Path, without: Callable[[str], None]) -> None:
    without("peft")
    with pytest.raises(ConfigError, match=r"model\.adapter='a/b' .*pip install peft"):
        load_language_model(config(root, adapter="a/b"), CPU)
    without("bitsandbytes")
    cfg, plain = config(root, quantization="4bit"), LlamaForCausalLM.config_class()
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        placement.loading_options(cfg, plain, torch.device("cuda"))


def test_quantisation_that_cannot_be_is_told(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization='8bit' needs a CUDA GPU"):
        load_language_model(config(root, quantization="8bit"), CPU)
    stored = LlamaForCausalLM.config_class(quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match="weights are gptq already; leave that key out"):
        placement.loading_options(config(root, quantization="4bit"), stored, CPU)
    for cfg, kind in (
        (config(root, adapter="a/b"), "gptq"),
        (config(root, adapter="a/b", quantization="4bit"), "4bit"),
    ):
        model = stored if cfg.quantization is None else LlamaForCausalLM.config_class()
        with pytest.raises(ConfigError, match=f"cannot be merged into {kind} weights"):
            placement.loading_options(cfg, model, CPU)


def test_stored_quantisation_goes_to_its_device_and_names_what_it_lacks(
    root: Path, tmp_path: Path
) -> None:
    folder = save_llama(tmp_path / "gptq")
    about = json.loads((folder / "config.json").read_text())
    about["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(about))
    config_ = LlamaForCausalLM.config_class.from_pretrained(folder)
    assert placement.own_quantization(config_) == "gptq"
    assert placement.loading_options(config(root), config_, CPU) == {"device_map": {"": "cpu"}}
    with pytest.raises(ConfigError, match=r"model\.name=.* cannot be loaded: .*") as e:
        load_language_model(ModelConfig(name=str(folder)), CPU)
    assert "\n" not in str(e.value)


def test_bitsandbytes_is_asked_for_on_a_gpu(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    model, device = LlamaForCausalLM.config_class(), torch.device("cuda", 1)
    eight, four = (
        placement.loading_options(config(root, quantization=kind), model, device)
        for kind in ("8bit", "4bit")
    )
    assert eight["device_map"] == four["device_map"] == {"": "cuda:1"}
    from_dict = AutoQuantizationConfig.from_dict
    assert from_dict(eight["quantization_config"]).load_in_8bit
    found = from_dict(four["quantization_config"])
    assert (found.load_in_4bit, found.bnb_4bit_quant_type) == (True, "nf4")
    assert found.bnb_4bit_compute_dtype == torch.bfloat16


def test_identity_covers_quantisation(root: Path) -> None:
    plain, four = model_parts(config(root)), model_parts(config(root, quantization="4bit"))
    assert plain is not None
    assert four is not None
    assert difference(plain, four) == ("model config quantization", None, "4bit")
    assert plain == model_parts(config(root, device_map="auto")), "where it lies changes nothing"


def test_a_device_map_gives_the_same_model(root: Path) -> None:
    plain = load_language_model(config(root), CPU)
    ids = torch.arange(5, 25)[None]
    seen = torch.ones_like(ids, dtype=torch.bool)
    for places in ("auto", "balanced", {"": "cpu"}):
        lm = load_language_model(config(root, device_map=places), CPU)
        assert lm.device == CPU
        assert weights_checksum(lm) == weights_checksum(plain)
        with torch.no_grad():
            assert torch.equal(run_model(lm, ids, seen).logits, run_model(plain, ids, seen).logits)
    with pytest.raises(ConfigError, match=r"'model.layer' is no module .*'model\.layers'"):
        load_language_model(config(root, device_map={"model.layer": "cpu"}), CPU)
    with pytest.raises(ConfigError, match=r"model\.device_map gives no device for model\.norm"):
        load_language_model(
            config(root, device_map={"model.layers": "cpu", "model.embed_tokens": "cpu"}), CPU
        )


def test_parts_kept_out_of_the_gpus_are_told(root: Path) -> None:
    lm = load_language_model(config(root), CPU)
    cfg = config(root, device_map="auto")
    lm.model.hf_device_map = {"model.embed_tokens": 0, "model.layers": "cpu", "lm_head": "disk"}
    with pytest.raises(ConfigError, match=r"'auto' puts 2 of 3 parts of the model out of the GPUs"):
        placement.first_device(cfg, lm.model, torch.device("cuda"))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_the_processes_of_a_host_part_its_gpus(count: int, world: int) -> None:
    if world > count:
        return
    shares = [placement.own_gpus(rank, count, rank, world) for rank in range(world)]
    assert sorted(gpu for share in shares for gpu in share) == list(range(count))
    assert [share[0] for share in shares] == list(range(world))


def test_what_takes_the_place_of_activations_is_on_their_device(root: Path) -> None:
    lm = load_language_model(config(root), CPU)
    ids = torch.arange(5, 25)[None]
    with replace_activations(lm, "model.layers.1", torch.zeros_like), torch.no_grad():
        logits = run_model(lm, ids, torch.ones_like(ids, dtype=torch.bool)).logits
    assert logits.isfinite().all()


@pytest.mark.gpu
def test_a_model_over_two_gpus(root: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0}
    places |= {"model.layers.1": 1, "model.layers.2": 1, "model.norm": 1, "lm_head": 1}
    device, ids = torch.device("cuda", 0), torch.arange(5, 25, device="cuda:0")[None]
    plain = load_language_model(config(root), device)
    lm = load_language_model(config(root, device_map=places), device)
    assert weights_checksum(lm) == weights_checksum(plain)
    seen = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        far = run_model(lm, ids, seen).logits
        assert far.device == device
        assert torch.allclose(far, run_model(plain, ids, seen).logits, atol=1e-2)
        with replace_activations(lm, "model.layers.2", lambda x: x + x.to(device)):
            run_model(lm, ids, seen)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_weights_are_quantised_on_the_gpu(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    save_llama(tmp_path / "model", width=64)
    lm = load_language_model(config(tmp_path, quantization=kind), torch.device("cuda", 0))
    assert any(w.dtype in (torch.int8, torch.uint8) for w in lm.model.parameters())
    ids = torch.arange(5, 25, device="cuda")[None]
    with torch.no_grad():
        assert run_model(lm, ids, torch.ones_like(ids, dtype=torch.bool)).logits.isfinite().all()
    assert weights_checksum(lm) == weights_checksum(lm)
