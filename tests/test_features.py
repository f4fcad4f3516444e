"""What is shown of latents against a plain recomputation from the stored rows; the page in a
browser.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from flash_sae_dist import TopKSAE
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.importing import ImportOptions, run_import
from flash_sae_dist.activations.language_model import capture_activations, load_language_model
from flash_sae_dist.activations.sequential import batches_in_order
from flash_sae_dist.activations.store import ActivationStore, as_float64
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.run import FeaturesConfig
from flash_sae_dist.evaluation.finished import FinishedSAE
from flash_sae_dist.features import collect, records, runner
from flash_sae_dist.features.directions import nearest_latents, output_tokens
from flash_sae_dist.features.exchange import circuit_tracer_files, neuronpedia_batches
from flash_sae_dist.features.folder import FeatureFolder
from flash_sae_dist.features.line_processes import line_processes, num_processes
from flash_sae_dist.features.lines import Examples, Line, Part
from flash_sae_dist.features.page import FeatureFiles
from flash_sae_dist.features.pairs import ActivePairs, PairSpool, active_pairs
from flash_sae_dist.features.runner import run_features
from flash_sae_dist.features.running import ActivationCounts, TopRows, chance_keys, size_keys
from flash_sae_dist.features.words import Words
from flash_sae_dist.files import json_text
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.models import ARCHITECTURES, load_sae
from flash_sae_dist.models.base import Pairs, Slots, SparseCoder
from flash_sae_dist.models.crosscoder import Crosscoder
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import config_data, save_llama

CPU = torch.device("cpu")
JOB = "model.layers.0"


class Run(NamedTuple):
    """A folder with a store, an SAE and what `features` wrote."""

    data: dict[str, Any]
    store: ActivationStore
    sae: SparseCoder
    records: list[dict[str, Any]]


def make_run(root: Path, **cache: Any) -> Run:
    data = config_data(root, **cache)
    run_cache(parse_config(data), Accelerator(cpu=True))
    data["train"] |= {"num_tokens": 640}
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    data["features"] = {"batch_tokens": 100, "context_tokens": 5}
    (folder,) = run_features(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    return Run(data, store, TopKSAE.load(folder.parent / "sae"), read_records(folder))


def read_records(folder: Path) -> list[dict[str, Any]]:
    with gzip.open(folder / "features.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return make_run(tmp_path_factory.mktemp("features"))


def dense_activations(run: Run) -> Tensor:
    """All activations [rows, d_sae] of the stored rows, the plain way."""
    bits = run.store.read(f"activations/{JOB}", 0, run.store.rows)
    x = torch.from_numpy(as_float64(bits, "float32")).float()
    with torch.no_grad():
        pre = (x - run.sae.b_dec) @ run.sae.W_enc.T + run.sae.b_enc
    top, where = pre.relu().topk(run.sae.config.k, dim=1)  # type: ignore[attr-defined]
    return torch.zeros_like(pre).scatter_(1, where, top)


def test_examples_equal_a_plain_recomputation(run: Run) -> None:
    """Of 50 latents drawn by chance the ten largest activations, their rows and tokens, and the
    activation of every token that is shown beside them."""
    acts = dense_activations(run)
    ids, rows = (
        run.store.read_stored(f"text/{name}", 0, 10**6).reshape(-1) for name in ("ids", "row")
    )
    place = {int(row): at for at, row in enumerate(rows) if row >= 0}
    tokenizer = words_of(run)
    length = run.store.config["cache.context_length"]
    assert [r["index"] for r in run.records] == list(range(64))
    unstored = 0
    for latent in random.Random(0).sample(range(64), 50):
        record, of_latent = run.records[latent], acts[:, latent]
        order = (-of_latent).argsort(stable=True)[:10]
        order = order[of_latent[order] > 0].tolist()
        top = [e for e in record["examples"] if e["group"] == "top"]
        assert [e["row"] for e in top[:10]] == order
        assert [e["value"] for e in top[:10]] == pytest.approx(of_latent[order].tolist(), rel=1e-5)
        for example in record["examples"]:
            at = place[example["row"]]
            start = at - at % length
            around = range(max(start, at - 5), min(start + length, at + 6))
            assert example["at"] == at - around.start
            assert example["tokens"] == tokenizer.of(ids[around.start : around.stop].tolist())
            for shown, token in zip(example["values"], around, strict=True):
                if (row := int(rows[token])) < 0:
                    assert shown is None
                    unstored += 1
                else:
                    assert shown == pytest.approx(float(of_latent[row]), rel=1e-3)
    assert unstored, "sequences begin with a token that is not stored"


def words_of(run: Run) -> Words:
    config = parse_config(run.data)
    assert config.model is not None
    return Words(load_language_model(config.model, CPU).tokenizer)


def test_numbers_equal_their_definitions(run: Run) -> None:
    acts = dense_activations(run)
    for record in run.records:
        active = acts[:, record["index"]]
        active = active[active > 0].double()
        assert record["fired"] == len(active) == sum(record["histogram"]["counts"])
        assert record["density"] == len(active) / run.store.rows
        if not len(active):
            assert record["examples"] == []
            continue
        assert record["max"] == pytest.approx(float(active.max()), rel=1e-5)
        assert record["mean"] == pytest.approx(float(active.mean()), rel=1e-5)
        edges = record["histogram"]["edges"]
        assert edges[0] <= float(active.min()) * 1.001
        assert edges[-1] >= float(active.max()) * 0.999
        for share, value in record["quantiles"].items():
            near = np.quantile(active, float(share), method="inverted_cdf")
            assert value == pytest.approx(near, rel=0.045)


def test_each_fifth_of_the_activations_has_examples(run: Run) -> None:
    for record in run.records:
        drawn = [e for e in record["examples"] if e["group"] != "top"]
        assert len(drawn) == min(record["fired"], 20)
        assert len({e["row"] for e in drawn}) == len(drawn)
        values = [e["value"] for e in drawn]
        assert values == sorted(values, reverse=True)
        if record["fired"] >= 20:
            groups = ["80-100%", "60-80%", "40-60%", "20-40%", "0-20%"]
            assert [e["group"] for e in drawn] == [g for g in groups for _ in range(4)]


def test_examples_are_the_models_own_activations(run: Run) -> None:
    config = parse_config(run.data)
    assert config.model is not None
    lm = load_language_model(config.model, CPU)
    sequences, rows = (run.store.read_stored(f"text/{name}", 0, 10**6) for name in ("ids", "row"))
    ids = torch.from_numpy(sequences.astype(np.int64))
    x = capture_activations(lm, [JOB], ids, torch.ones_like(ids, dtype=torch.bool))[JOB]
    with torch.no_grad():
        codes = run.sae.encode(x.reshape(-1, x.shape[-1]))
    of_row = {int(row): at for at, row in enumerate(rows.reshape(-1))}
    for record in run.records[:50]:
        for example in record["examples"][:10]:
            at = of_row[example["row"]]
            found = codes.values[at][codes.latents[at] == record["index"]]
            assert example["value"] == pytest.approx(float(found.sum()), rel=1e-4)


@pytest.mark.parametrize(
    "sae",
    [
        {"architecture": "batch_topk", "k": 4, "d_sae": 64},
        {"architecture": "jumprelu", "d_sae": 64},
        {"architecture": "relu", "d_sae": 64},
    ],
    ids=lambda sae: str(sae["architecture"]),
)
def test_every_architecture_shows_its_activations(
    run: Run, tmp_path: Path, sae: dict[str, Any]
) -> None:
    data = run.data | {"output": str(tmp_path / "run"), "sae": sae, "grid": None}
    data["train"] = data["train"] | {"num_tokens": 1280, "holdout": 0.1}
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    (folder,) = run_features(parse_config(data), Accelerator(cpu=True))
    own = load_sae(folder.parent / "sae")
    x = torch.from_numpy(run.store.read(f"activations/{JOB}", 0, run.store.rows))
    with torch.no_grad():
        codes = own.encode(x)
    for record in read_records(folder):
        active = (codes.latents == record["index"]) & (codes.values > 0)
        values = codes.values[active].sort(descending=True).values
        assert record["fired"] == len(values)
        top = [e["value"] for e in record["examples"] if e["group"] == "top"]
        assert top == pytest.approx(values[:16].tolist(), rel=1e-5)


def test_rows_that_are_left_out_count_nowhere(tmp_path: Path) -> None:
    run = make_run(tmp_path, max_norm_ratio=1.3)
    lost = set(run.store.left_out.tolist())
    assert lost
    fired = sum(record["fired"] for record in run.records)
    assert fired == int(
        (dense_activations(run) > 0).sum(dim=1)[sorted(set(range(1500)) - lost)].sum()
    )
    examples = [e for record in run.records for e in record["examples"]]
    assert not lost & {e["row"] for e in examples}
    unknown = {
        t for e in examples for t, v in zip(e["tokens"], e["values"], strict=True) if v is None
    }
    assert unknown - {" <s>", " </s>"}, "tokens of those rows are marked as not stored"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("cache", [{}, {"max_norm_ratio": 1.3}], ids=["all", "some-left-out"])
def test_pairs_are_looked_at_in_any_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, cache: dict[str, Any]
) -> None:
    whole = make_run(tmp_path, **cache)
    monkeypatch.setattr(collect, "_PAIRS_AT_ONCE", 700)
    one: Any = SimpleNamespace(device=torch.device(device), process_index=0, num_processes=1)
    one.is_main_process, one.wait_for_everyone = True, lambda: None
    (folder,) = run_features(parse_config(whole.data), one)
    found = read_records(folder)
    if device == "cpu":
        assert found == whole.records
    for record, other in zip(found, whole.records, strict=True):
        assert record["fired"] == other["fired"]
        assert record["mean"] == pytest.approx(other["mean"], rel=1e-4)
        for part in ("row", "tokens"):
            shown = [[e[part] for e in r["examples"]] for r in (record, other)]
            assert shown[0] == shown[1]


def test_chosen_latents_and_fewer_rows(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.data["output"], tmp_path / "run")
    data = run.data | {"output": str(tmp_path / "run")}
    data["features"] = {"latents": [40, 3, 3], "num_tokens": 777, "output_tokens": 0, "nearest": 2}
    (folder,) = run_features(parse_config(data), Accelerator(cpu=True))
    records = read_records(folder)
    acts = dense_activations(run)[:777]
    assert [r["index"] for r in records] == [3, 40]
    for record in records:
        assert record["fired"] == int((acts[:, record["index"]] > 0).sum())
        assert "raised" not in record
        assert len(record["nearest"]) == 2
        assert max(e["row"] for e in record["examples"]) < 777
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["left_out"] == ["raised", "lowered"]
    assert (summary["tokens"], summary["latents"]) == (777, 2)
    assert not list(folder.glob("*.tmp")), "the pass's own files are gone"


def bytes_of(folder: Path) -> dict[str, bytes]:
    """The files of what was found, by name."""
    names = ("features.jsonl.gz", "data/latents-0.js", "data/summary.js")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.mark.parametrize("left_out", [[], ["model", "text", "cache"]], ids=["words", "numbers"])
def test_processes_make_the_same_lines(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: list[str]
) -> None:
    """Parts that either process may be asked for."""
    shutil.copytree(run.data["output"], tmp_path / "run")
    data = run.data | {"output": str(tmp_path / "run")}
    if left_out:
        data |= {"store": data["cache"]["store"]}
    config = parse_config({key: value for key, value in data.items() if key not in left_out})
    monkeypatch.setattr(records, "LATENTS_AT_ONCE", 7)
    found = []
    for count in (0, 2):
        monkeypatch.setattr(runner, "num_processes", lambda *_, count=count: count)
        (folder,) = run_features(config, Accelerator(cpu=True))
        found.append(bytes_of(folder))
    assert found[0] == found[1]


def test_a_crosscoders_norms_are_shown(tmp_path: Path) -> None:
    data = config_data(tmp_path, hookpoints=[JOB, "model.layers.1"])
    run_cache(parse_config(data), Accelerator(cpu=True))
    data["sae"] = {"architecture": "topk_crosscoder", "k": 4, "d_sae": 64}
    data["train"] |= {"num_tokens": 640, "hookpoint": f"{JOB}+model.layers.1"}
    config = parse_config(data | {"grid": None})
    run_jobs(config, Accelerator(cpu=True), grid=False)
    (folder,) = run_features(config, Accelerator(cpu=True))
    sae = load_sae(folder.parent / "sae")
    assert isinstance(sae, Crosscoder)
    norms = sae.decoder_norms(sae.W_dec)
    for record in read_records(folder):
        assert list(record["decoder_norms"]) == [JOB, "model.layers.1"]
        shown = torch.tensor(list(record["decoder_norms"].values()))
        assert torch.allclose(shown, norms[record["index"]], atol=1e-4)


def test_a_process_that_ends_is_told() -> None:
    with line_processes(2) as processes:
        processes.begin({5: " five"})
        processes._started[0].kill()
        # The second is asked what it cannot answer.
        zeros: Any = [0] * 20
        no_part = Part(*zeros[: len(Part._fields) - 1], Examples(*zeros[: len(Examples._fields)]))
        for code in (-9, 1, -9):
            with pytest.raises(UserError, match=f"of latents ended with code {code}; look above"):
                processes.lines_of(no_part)


def test_processes_end_with_the_one_that_started_them() -> None:
    with line_processes(1) as processes:
        (process,) = processes._started
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(60) == 0
        process.stdin = None
    with line_processes(1) as processes:
        (process,) = processes._started
    assert process.returncode == -9


def test_processes_are_started_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    cores: set[int] = set()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: cores)
    found = {}
    for count in (1, 2, 3, 16, 64):
        cores = set(range(count))
        found[count] = [num_processes(n, 1) for n in (64, 4096, 24_576)]
    assert found == {1: [0] * 3, 2: [0] * 3, 3: [0, 2, 2], 16: [0, 4, 8], 64: [0, 4, 8]}
    assert num_processes(24_576, 8) == 7, "of eight launches with 64 cores"


def test_imported_rows_have_the_text_of_their_documents(tmp_path: Path) -> None:
    """Without a model: neighbours in a document are neighbours in an example."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "rows.npy", rng.standard_normal((600, 16)).astype(np.float32))
    options = ImportOptions("float32", 0, 128.0, "20")
    run_import(str(tmp_path / "store.zarr"), [f"{JOB}={tmp_path / 'rows.npy'}"], options)
    data = {
        key: value
        for key, value in config_data(tmp_path).items()
        if key not in ("model", "text", "cache", "grid", "evaluate")
    }
    data |= {"store": str(tmp_path / "store.zarr"), "features": {"context_tokens": 2}}
    data["train"] |= {"num_tokens": 640}
    run_jobs(parse_config(data), Accelerator(cpu=True), grid=False)
    (folder,) = run_features(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["store"])
    document, position = (
        store.read_stored(f"tokens/{name}", 0, 600) for name in ("document", "position")
    )
    row_at = {(d, p): row for row, (d, p) in enumerate(zip(document, position, strict=True))}
    acts = dense_activations(
        Run(data, store, TopKSAE.load(folder.parent / "sae"), read_records(folder))
    )
    for record in read_records(folder):
        assert "raised" not in record
        for example in record["examples"]:
            for at, value in enumerate(example["values"], start=-example["at"]):
                row = row_at[example["document"], example["position"] + at]
                assert value == pytest.approx(float(acts[row, record["index"]]), rel=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float32"])
def test_rows_come_in_their_order(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((500, 16), np.float32))
    options = ImportOptions(dtype, 0, 128.0, None)
    run_import(str(tmp_path / "s.zarr"), [f"h={tmp_path / 'x.npy'}"], options)
    store = ActivationStore.open(str(tmp_path / "s.zarr"))
    batches = list(batches_in_order(store, ["h"], stop=421, batch_tokens=70, device=CPU))
    assert [len(batch.numbers) for batch in batches] == [70] * 6 + [1]
    assert np.concatenate([batch.numbers for batch in batches]).tolist() == list(range(421))
    rows = torch.cat([batch.rows[0] for batch in batches])
    found = torch.from_numpy(as_float64(store.read("activations/h", 0, 421), "float32"))
    if dtype != "int8":
        found = torch.from_numpy(as_float64(store.read("activations/h", 0, 421), dtype))
    assert torch.equal(rows.double(), found.to(rows.dtype).double())


def random_pairs(rows: int, latents: int, seed: int) -> ActivePairs:
    """A flat list, as an architecture by threshold has it; many values are equal."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(rows, latents, generator=generator) < 0.2
    row, latent = active.nonzero(as_tuple=True)
    values = torch.randint(1, 9, (len(row),), generator=generator).float() / 4
    return ActivePairs(row, latent, values)


@pytest.mark.parametrize("parts", [1, 7])
def test_running_tops_are_exact_in_any_blocks(parts: int) -> None:
    pairs = random_pairs(900, 13, seed=parts)
    top = TopRows(13, 10, CPU)
    for rows in torch.arange(900).chunk(parts):
        some = pairs.at((pairs.rows >= rows[0]) & (pairs.rows <= rows[-1]))
        top.add(some, size_keys(some))
    for latent in range(13):
        mine = pairs.at(pairs.latents == latent)
        order = (-mine.values).argsort(stable=True)[:10]
        assert top.rows[latent].tolist() == mine.rows[order].tolist()
        assert torch.equal(top.keys[latent].view(torch.float32), mine.values[order])


def test_samples_are_of_chance() -> None:
    """Whatever the activation: of 2,000 rows in two halves about as many of each."""
    rows = torch.arange(2000).repeat_interleave(40)
    latents = torch.arange(40).repeat(2000)
    pairs = ActivePairs(rows, latents, torch.ones(len(rows)))
    sample = TopRows(40, 50, CPU)
    sample.add(pairs, chance_keys(pairs))
    assert len(sample.rows.unique()) > 1000, "latents draw rows of their own"
    assert 900 < int((sample.rows < 1000).sum()) < 1100


def test_codes_become_pairs_in_order(tmp_path: Path) -> None:
    values = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.5]])
    latents = torch.tensor([[5, 2, 7], [1, 4, 0]], dtype=torch.int32)
    pairs = active_pairs([Slots(values, latents)], torch.tensor([10, 11]))
    assert pairs.rows.tolist() == [10, 10, 11, 11]
    assert pairs.latents.tolist() == [2, 5, 0, 4]
    assert pairs.values.tolist() == [1.0, 2.0, 0.5, 3.0]
    flat = torch.tensor([2.0, 1.0, 0.0, 3.0, 0.5, 0.0])
    tokens = torch.tensor([0, 0, 0, 1, 1, 0], dtype=torch.int32)
    listed = torch.tensor([5, 2, 7, 4, 0, 0], dtype=torch.int32)
    offsets = torch.tensor([0, 3, 5], dtype=torch.int32)
    for part, other in zip(
        active_pairs([Pairs(tokens, listed, flat, offsets)], torch.tensor([10, 11])),
        pairs,
        strict=True,
    ):
        assert torch.equal(part, other)
    with PairSpool(tmp_path) as spool:
        spool.add(active_pairs([Slots(values[:0], latents[:0])], torch.arange(0)), 0, 0)
        spool.add(active_pairs([Slots(values, latents)], torch.arange(2)), 0, 2)
        spool.close()
        found = spool.values_at(np.array([0, 0, 1, 1, -1, 2]), np.array([5, 7, 4, 1, 5, 5]))
    np.testing.assert_array_equal(found, [2.0, 0.0, 3.0, 0.0, np.nan, np.nan])
    assert not list(tmp_path.iterdir())


def test_activations_far_from_the_unit_are_counted() -> None:
    counts = ActivationCounts(1, 1.0, CPU)
    values = torch.tensor([1e-30, 1.0, 1e30])
    counts.add(ActivePairs(torch.arange(3), torch.zeros(3, dtype=torch.int64), values), 3)
    assert counts.fired().tolist() == [3]
    assert counts.by_bin()[0].nonzero().flatten().tolist() == [0, 256, 575]


def test_directions_equal_their_definitions() -> None:
    W_dec, unembedding = torch.randn(40, 8), torch.randn(100, 8)
    raised, lowered = output_tokens(W_dec[[3, 7]], unembedding, 5)
    logits = W_dec[[3, 7]] @ unembedding.T
    assert torch.equal(raised.indices, logits.argsort(dim=1, descending=True)[:, :5])
    assert torch.equal(lowered.indices, logits.argsort(dim=1)[:, :5])
    near = nearest_latents(W_dec, torch.tensor([3, 7]), 39)
    cosines = torch.cosine_similarity(W_dec[[3, 7], None], W_dec[None], dim=2)
    assert torch.allclose(near.scores, cosines.gather(1, near.indices), atol=1e-6)
    assert 3 not in near.indices[0]
    assert near.scores[0, 0] == pytest.approx(float(cosines[0].topk(2).values[1]), abs=1e-6)


def test_raised_tokens_are_the_models(run: Run) -> None:
    config = parse_config(run.data)
    assert config.model is not None
    lm = load_language_model(config.model, CPU)
    unembedding: Any = lm.model.get_output_embeddings().weight  # type: ignore[operator]
    logits = run.sae.W_dec[7] @ unembedding.T
    found = run.records[7]["raised"]
    assert [number for _, number, _ in found] == logits.topk(10).indices.tolist()
    assert found[0][0] == Words(lm.tokenizer).of([found[0][1]])[0]


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"saes": ["model.layers.1"]}, "features.saes: 'model.layers.1' is no finished SAE"),
        ({"latents": [64]}, "features.latents: 64 is no latent of model.layers.0, which has 0"),
    ],
)
def test_what_is_not_there_is_told(run: Run, values: dict[str, Any], told: str) -> None:
    data = run.data | {"features": values}
    with pytest.raises(ConfigError, match=told):
        run_features(parse_config(data), Accelerator(cpu=True))


def test_the_page_is_there_only_where_all_is(tmp_path: Path) -> None:
    line = Line(b'{"index":0,"examples":[]}', [0])
    page, lines = tmp_path / "index.html", tmp_path / "features.jsonl.gz"
    with FeatureFiles(tmp_path, {}) as files:
        files.add(line)
        files.finish()
        assert page.is_file()
        assert read_records(tmp_path) == [{"index": 0, "examples": []}]

    def stopped() -> None:
        with FeatureFiles(tmp_path, {}) as files:
            assert not page.exists()
            assert not lines.exists()
            files.add(line)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        stopped()
    assert not page.exists()
    assert not lines.exists()


def finished(root: Path, name: str, sae: dict[str, Any], l0: float | None = None) -> FinishedSAE:
    folder = root / name
    ARCHITECTURES[sae["architecture"]].from_config(
        ARCHITECTURES[sae["architecture"]].Config(d_sae=8, **sae), 4
    ).save(folder / "sae")
    job = {"output": str(root), "sae": sae | {"d_sae": 8}, "train": {"hookpoint": name}}
    job["train"] |= {"num_tokens": 1}
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    if l0 is not None:
        (folder / "metrics.jsonl").write_text(json_text({"step": 9, "tokens": 9, "l0": l0}) + "\n")
    return FinishedSAE(name, folder, name)


def test_the_disk_is_asked_for_all_that_run_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = [
        finished(tmp_path, "a", {"architecture": "topk", "k": 3}),
        finished(tmp_path, "b", {"architecture": "relu"}, l0=6.5),
        finished(tmp_path, "c", {"architecture": "relu"}),
    ]
    asked: list[int] = []
    monkeypatch.setattr(runner, "check_space", lambda _, __, needed, ___: asked.append(needed))
    store: Any = SimpleNamespace(rows=1000)
    cfg = FeaturesConfig(num_tokens=50)
    for chosen, together in ((saes[:1], 1), (saes[:2], 1), (saes[:2], 2), (saes, 2)):
        runner._check_disk(tmp_path, chosen, cfg, store, together)
    assert asked == [8 * 50 * actives for actives in (3, 7, 3 + 7, 7 + 100)]


def test_pairs_of_killed_runs_go(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = finished(tmp_path, name, {"architecture": "topk", "k": 3}).folder / "features"
        folder.mkdir()
        (folder / ".pairs-values.tmp").write_bytes(b"x")
    runner._remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_transcoders_rows_are_compared_with_the_unembedding(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sae = TopKSAE(4, 8, 3, d_out=6)
    kept: Any = SimpleNamespace(latents=torch.arange(2))
    found = FinishedSAE("job", Path("job"), "h", "mlp")
    cfg = FeaturesConfig(nearest=1, output_tokens=2)
    for width in (6, 4):
        model = runner._Model(None, torch.randn(10, width))
        raised = runner._directions(found, sae, kept, cfg, model).raised
        assert (raised is not None) == (width == 6)
    assert "its decoder's rows are of width 6 and the model's unembedding of 4" in caplog.text


def test_another_model_is_refused(run: Run, tmp_path: Path) -> None:
    save_llama(tmp_path / "other", layers=4)
    data = run.data | {"model": {"name": str(tmp_path / "other"), "dtype": "float32"}}
    with pytest.raises(ConfigError, match="differs from .* or features.output_tokens=0"):
        run_features(parse_config(data), Accelerator(cpu=True))


def test_other_tools_files_hold_the_same(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs/features.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    folder = Path(run.data["output"]) / JOB / "features"
    exec(block.replace("runs/quickstart/model.layers.8/k=32/features", str(folder)), {})
    record = max(run.records, key=lambda r: r["fired"])
    (batch,) = [json.loads(path.read_text()) for path in Path("batches").iterdir()]
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("smollm2-135m", 8, "res-mine")
    assert [feature["feature_index"] for feature in batch["features"]] == list(range(64))
    feature = batch["features"][record["index"]]
    assert sum(feature["freq_hist_data_bar_heights"]) == pytest.approx(record["fired"], abs=0.1)
    assert [len(a["tokens"]) for a in feature["activations"]] == [
        len(example["tokens"]) for example in record["examples"]
    ]
    for shown, example in zip(feature["activations"], record["examples"], strict=True):
        at = shown["qualifying_token_index"]
        assert shown["tokens"][at] == example["tokens"][example["at"]]
        assert shown["values"][at] == pytest.approx(example["value"], rel=1e-3)
        assert shown["bin_min"] <= example["value"] <= shown["bin_max"]
    # circuit-tracer's page asks for a latent's bytes, of which the first four are their number.
    index = json.loads(gzip.decompress(Path("pages/index.json.gz").read_bytes()))["8"]
    data = (Path("pages") / index["filename"]).read_bytes()
    assert len(index["offsets"]) == 65
    start = index["offsets"][record["index"]]
    length = int.from_bytes(data[start : start + 4], "little")
    assert start + 4 + length == index["offsets"][record["index"] + 1]
    page = json.loads(zlib.decompress(data[start + 4 : start + 4 + length]))
    assert page["top_logits"] == feature["pos_str"] == [text for text, *_ in record["raised"]]
    groups = {q["quantile_name"]: len(q["examples"]) for q in page["examples_quantiles"]}
    assert sum(groups.values()) == len(record["examples"])
    assert list(groups)[0] == "Top Activations"
    assert page["histogram"] == feature["freq_hist_data_bar_heights"]
    with pytest.raises(ValueError, match="batches is not empty; name a new folder"):
        neuronpedia_batches(
            FeatureFolder(folder), Path("batches"), model_id="", layer=0, sae_set=""
        )


def test_latents_that_were_not_looked_at_have_no_examples(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(Path(run.data["output"]) / JOB / "features", tmp_path / "features")
    with gzip.open(folder / "features.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(run.records[40]) + "\n")
    circuit_tracer_files({0: FeatureFolder(folder)}, tmp_path / "pages")
    data = (tmp_path / "pages/layer_0.bin").read_bytes()
    offsets = json.loads(gzip.decompress((tmp_path / "pages/index.json.gz").read_bytes()))["0"][
        "offsets"
    ]
    pages = [
        json.loads(zlib.decompress(data[a + 4 : b]))
        for a, b in zip(offsets[:-1], offsets[1:], strict=True)
    ]
    assert [page["index"] for page in pages] == list(range(64))
    assert [page["index"] for page in pages if page["examples_quantiles"]] == [40]


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


# What a person does, in the page itself.
_TYPED = """<script>
addEventListener("load", () => {
  get("search").value = WORD;
  get("search").dispatchEvent(new Event("input"));
  document.body.dataset.beyond = document.documentElement.scrollWidth > innerWidth;
});
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="needs Chromium")
def test_the_page_works_from_the_disk_in_a_browser(run: Run, tmp_path: Path) -> None:
    folder = shutil.copytree(Path(run.data["output"]) / JOB / "features", tmp_path / "features")
    page = folder / "index.html"
    # As a crosscoder's have.
    data = folder / "data/latents-0.js"
    norms = '"decoder_norms":{"model.layers.1":0.5},"examples"'
    data.write_text(data.read_text().replace('"examples"', norms))

    def opened(file: Path, fragment: str = "") -> str:
        command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000"]
        command += ["--window-size=500,900"]
        done = subprocess.run(
            [*command, f"{file.as_uri()}{fragment}"], capture_output=True, text=True, timeout=60
        )
        return done.stdout

    record = max(run.records, key=lambda r: r["density"])
    body = opened(page)
    fired = sum(r["fired"] > 0 for r in run.records)
    assert f"{fired} of 64 latents" in body
    assert body.count('<td class="n"><a href="#') == fired
    one = opened(page, f"#{record['index']}")
    assert f"Latent {record['index']}</h1>" in one
    assert one.count('class="example"') == len(record["examples"])
    assert one.count("token centre") == len(record["examples"])
    assert 'class="token unstored"' in one
    assert "background: rgba" in one
    assert "decoder norm, model.layers.1" in one
    assert "token centre strong" in one, "dark letters on what is bright"
    word = record["examples"][0]["tokens"][record["examples"][0]["at"]].strip()
    search = folder / "search.html"
    search.write_text(page.read_text().replace("</body>", _TYPED.replace("WORD", json.dumps(word))))
    found = opened(search)
    shown = found.count('<td class="n"><a href="#')
    assert 0 < shown < fired
    assert 'data-beyond="false"' in found, "nothing is cut off on a narrow screen"
    assert f'<a href="#{record["index"]}">' in found
