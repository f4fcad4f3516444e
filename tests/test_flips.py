"""Flipped bits and cut files: whatever is read back is what was written, or a sentence says that it
is not.

A short run by default; `pytest -m torture tests/test_flips.py` flips 300 bits over all kinds of
file and every bit of the records.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from flash_sae_dist import files, interop
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.loader import ActivationLoader
from flash_sae_dist.activations.store import ActivationStore, DamagedStoreError
from flash_sae_dist.config.base import UserError
from flash_sae_dist.evaluation import report
from flash_sae_dist.evaluation.runner import run_evaluation
from flash_sae_dist.grid.runner import run_jobs
from flash_sae_dist.launch import export
from flash_sae_dist.models import load_sae
from flash_sae_dist.models.base import SparseCoder
from flash_sae_dist.models.topk import TopKSAE
from flash_sae_dist.training.job import Config, parse_config
from flash_sae_dist.training.metrics import read_metrics
from flash_sae_dist.verify import check, found_in
from tests.tiny_model import config_data

JOB = "run/model.layers.0"


class Made(NamedTuple):
    """A folder with all kinds of files, and what each verb makes of them."""

    root: Path
    config: Config
    wanted: dict[str, Any]


def weights(sae: SparseCoder) -> dict[str, Any]:
    return {name: value.tolist() for name, value in sae.state_dict().items()}


def verb_cache(root: Path, config: Config) -> Any:
    run_cache(config, Accelerator(cpu=True))


def verb_train(root: Path, config: Config) -> Any:
    """Of a finished job, and of one that goes on from its checkpoint."""
    run_jobs(config, Accelerator(cpu=True), grid=False)
    curve = [(line["step"], line["fvu"]) for line in read_metrics(root / JOB / "metrics.jsonl")]
    return weights(load_sae(root / JOB / "sae")), curve


def verb_resume(root: Path, config: Config) -> Any:
    shutil.rmtree(root / JOB / "sae")
    return verb_train(root, config)


def verb_evaluate(root: Path, config: Config) -> Any:
    return run_evaluation(config, Accelerator(cpu=True))


def verb_export(root: Path, config: Config) -> Any:
    export.run(config)
    found = sorted((root / "run/export").rglob("*"))
    return {str(p.relative_to(root)): p.read_bytes() for p in found if p.is_file()}


def verb_load(root: Path, config: Config) -> Any:
    """What Python users call."""
    store = ActivationStore.open(config.store_path())
    with ActivationLoader(store, "model.layers.0", batch_tokens=50, seed=0, num_steps=6) as rows:
        read = torch.cat(list(rows)).tolist()
    tokens = [store.read(f"tokens/{n}", 0, store.rows).tolist() for n in ("ids", "position")]
    lens = interop.load(root / "run/export/sae_lens/model.layers.0")
    other = interop.load(root / "run/export/sparsify/train/model.layers.0")
    mean = store.mean("model.layers.0").tolist()
    return read, tokens, mean, store.num_documents(), weights(lens), weights(other)


def verb_verify(root: Path, config: Config) -> Any:
    """What it found damaged."""
    return [p for thing in found_in(str(root)) for p in check(thing, lambda n: None)]


VERBS: dict[str, Callable[[Path, Config], Any]] = {
    "cache": verb_cache,
    "train": verb_train,
    "resume": verb_resume,
    "evaluate": verb_evaluate,
    "export": verb_export,
    "load": verb_load,
    "verify": verb_verify,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    with pytest.MonkeyPatch.context() as patch:
        quick(patch)
        root = tmp_path_factory.mktemp("flips") / "work"
        root.mkdir()
        data = config_data(root, num_tokens=300, shard_mib=0.004)
        data["train"] |= {"num_tokens": 320, "checkpoint_every": 3}
        data["evaluate"] |= {"loss_sequences": 0, "num_tokens": 128}
        config = parse_config(data)
        for verb in ("cache", "train", "evaluate", "export"):
            VERBS[verb](root, config)
        whole = root.with_name("whole")
        shutil.copytree(root, whole)
        wanted = {}
        for name, verb in VERBS.items():
            wanted[name] = verb(root, config)
            restore(whole, root)
        return Made(root, config, wanted)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Pictures are not read back."""
    patch.setattr(report, "plot_density", lambda *args: None)
    patch.setattr(report, "plot_all", lambda *args: [])


def restore(whole: Path, root: Path) -> None:
    for name in ("run", "store.zarr"):
        shutil.rmtree(root / name, ignore_errors=True)
        shutil.copytree(whole / name, root / name)


def kinds(root: Path) -> dict[str, list[Path]]:
    """The files that the project wrote, by kind: those of a kind differ in numbers and names."""
    found: dict[str, list[Path]] = {}
    for path in sorted([*(root / "store.zarr").rglob("*"), *(root / "run").rglob("*")]):
        if path.is_file() and path.suffix != ".png" and path.name != ".lock":
            parts = path.relative_to(root).parts
            kind = "/".join("N" if p[-1].isdigit() and len(p) < 4 else p for p in parts)
            kind = kind.replace("model.layers.1.mlp", "HOOK").replace("model.layers.0", "HOOK")
            kind = kind.replace("N/N", "N")
            found.setdefault("shard-N.json" if "shard-0" in path.name else kind, []).append(path)
    return found


def damaged(data: bytes, rng: random.Random) -> bytes:
    """One flipped bit, or now and then a file cut short."""
    if rng.random() < 0.2:
        return data[: rng.randrange(len(data))]
    torn = bytearray(data)
    bit = rng.randrange(8 * len(data))
    torn[bit // 8] ^= 1 << bit % 8
    return bytes(torn)


def outcome(verb: str, made: Made, caplog: pytest.LogCaptureFixture) -> str | None:
    """What is wrong with how a verb took a damaged file; None where it told or came to the same."""
    caplog.clear()
    try:
        got = VERBS[verb](made.root, made.config)
    except UserError as e:
        return None if "\n" not in str(e) else f"more than a sentence: {e}"
    except ValueError as e:
        # The loaders of Python's users.
        return None if verb == "load" else f"a traceback: {e!r}"
    except Exception as e:
        return f"a traceback: {e!r}"
    told = any(r.levelno >= logging.WARNING for r in caplog.records)
    if verb == "verify":
        return None if got else "unseen, though it reads every byte"
    if got == made.wanted[verb] or told:
        return None
    return "another result without a word"


def flip_all(
    made: Made, count: int, seed: int, caplog: pytest.LogCaptureFixture
) -> tuple[int, list[str]]:
    rng, wrong, done = random.Random(seed), [], 0
    whole = made.root.with_name("whole")
    every = list(kinds(made.root).items())
    rng.shuffle(every)
    logging.getLogger("flash_sae_dist").setLevel(logging.INFO)
    while done < count:
        kind, paths = every[done % len(every)]
        path = rng.choice(paths)
        data = path.read_bytes()
        torn = damaged(data, rng) if data else b"x"
        path.write_bytes(torn)
        for verb in ("verify", rng.choice([v for v in VERBS if v != "verify"])):
            problem = outcome(verb, made, caplog)
            # A line end behind a text has no meaning.
            if verb == "verify" and torn.rstrip(b"\n") == data.rstrip(b"\n"):
                continue
            if problem:
                at = next(
                    (i for i, (a, b) in enumerate(zip(data, torn, strict=False)) if a != b), 0
                )
                wrong.append(f"{verb} {kind} byte {at} of {len(data)}, now {len(torn)}: {problem}")
        restore(whole, made.root)
        done += 1
    return done, wrong


def test_no_flip_is_silent(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)
    done, wrong = flip_all(made, 60, 0, caplog)
    print(f"{done} flips and cuts, {len(wrong)} silent or with a traceback")
    assert not wrong


@pytest.mark.torture
def test_no_flip_of_many_is_silent(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    quick(monkeypatch)
    done, wrong = flip_all(made, 300, 1, caplog)
    print(f"{done} flips and cuts, {len(wrong)} silent or with a traceback")
    assert not wrong


RECORDS: dict[str, Callable[[Made], Any]] = {
    "store.zarr/records/geometry.json": lambda m: ActivationStore.open(m.config.store_path()).shape,
    "store.zarr/records/complete.json": lambda m: ActivationStore.open(m.config.store_path()).sums,
    f"{JOB}/sae/config.json": lambda m: weights(load_sae(m.root / JOB / "sae")),
}


def flip_bits(made: Made, name: str, bits: list[int]) -> list[int]:
    """The bits of a record whose flip is not told and changes what is read."""
    path, read, silent = made.root / name, RECORDS[name], []
    whole, wanted = path.read_bytes(), RECORDS[name](made)
    try:
        for bit in bits:
            torn = bytearray(whole)
            torn[bit // 8] ^= 1 << bit % 8
            path.write_bytes(torn)
            try:
                if read(made) != wanted:
                    silent.append(bit)
            except ValueError:
                continue
    finally:
        path.write_bytes(whole)
    return silent


@pytest.mark.parametrize("name", RECORDS)
def test_no_flipped_bit_of_a_record_is_silent(made: Made, name: str) -> None:
    bits = 8 * (made.root / name).stat().st_size
    assert not flip_bits(made, name, random.Random(0).sample(range(bits), 200))


@pytest.mark.torture
@pytest.mark.parametrize("name", RECORDS)
def test_no_bit_of_a_record_is_silent(made: Made, name: str) -> None:
    bits = 8 * (made.root / name).stat().st_size
    assert not flip_bits(made, name, list(range(bits)))
    print(f"every bit of {name}: {bits}, 0 silent")


@pytest.mark.parametrize("sealed", [files.json_text({"k": 4}), files.yaml_text("k: 4\n")])
def test_no_bit_of_a_sealed_text_turns_its_check_off(sealed: str) -> None:
    data = sealed.encode()
    assert files.check_seal(data)
    assert not files.check_seal(data.split(b"\n", 1)[1] if b"\n" in data else b'{"k": 4}')
    for bit in range(8 * len(data.rstrip(b"\n"))):
        torn = bytearray(data)
        torn[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ValueError, match=r"crc32c changed|cannot be read"):
            files.check_seal(bytes(torn))


def test_a_flipped_part_of_the_text_is_made_anew(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And all behind it; what it holds is never taken."""
    data = config_data(tmp_path)
    run_cache(parse_config(data), Accelerator(cpu=True))
    store = ActivationStore.open(data["cache"]["store"])
    before = store.read("tokens/ids", 0, store.rows)
    for file in sorted((tmp_path / "store.zarr/text").rglob("c/*/0")):
        if "row" in file.parts:
            continue
        whole = file.read_bytes()
        file.write_bytes(bytes([*whole[:-9], whole[-9] ^ 4, *whole[-8:]]))
        with pytest.raises(DamagedStoreError, match="text/"):
            store.verify()
        (tmp_path / "store.zarr/records/shard-00000000.json").unlink()
        caplog.clear()
        run_cache(parse_config(data), Accelerator(cpu=True))
        assert "is made anew" in caplog.text
        assert file.read_bytes() == whole
    store = ActivationStore.open(data["cache"]["store"])
    store.verify()
    assert np.array_equal(store.read("tokens/ids", 0, store.rows), before)


class Tied(TopKSAE):
    """An SAE whose encoder is its decoder."""

    def __init__(self, *args: Any, **place: Any) -> None:
        super().__init__(*args, **place)
        self.W_enc = self.W_dec


def test_tied_weights_are_saved_whole(tmp_path: Path) -> None:
    sae = Tied(6, 12, 2)
    sae.save(tmp_path)
    assert torch.equal(Tied.load(tmp_path).W_enc, sae.W_enc)
    assert torch.equal(TopKSAE.load(tmp_path).W_enc, sae.W_dec)
    interop.save(sae, tmp_path / "lens", "sae_lens", interop.About("model.layers.0"))
    assert torch.equal(interop.load(tmp_path / "lens").W_enc, sae.W_dec)


def test_saes_of_before_checksums_are_read(tmp_path: Path) -> None:
    sae = TopKSAE(6, 12, 2)
    sae.save(tmp_path)
    spec = files.read_json(tmp_path / "config.json")
    del spec["weights_crc32c"]
    (tmp_path / "config.json").write_text(json.dumps(spec, indent=2))
    assert torch.equal(TopKSAE.load(tmp_path).W_enc, sae.W_enc)


@pytest.mark.parametrize("what", ["codec", "inside a shard", "v2", "type"])
def test_metadata_that_ask_for_more_than_ours_are_refused(made: Made, what: str) -> None:
    """A store of another's making, without checksums."""
    store = ActivationStore.open(made.config.store_path())
    file = made.root / "store.zarr/tokens/ids/zarr.json"
    whole = file.read_bytes()
    metadata = json.loads(whole)
    if what == "codec":
        metadata["codecs"].append({"name": "numcodecs.pickle"})
    elif what == "inside a shard":
        metadata["codecs"][0]["configuration"]["codecs"].append({"name": "numcodecs.pickle"})
    elif what == "v2":
        metadata["zarr_format"] = 2
    else:
        metadata["data_type"] = {"name": "variable_length_bytes"}
    try:
        file.write_text(json.dumps(metadata))
        with pytest.raises(DamagedStoreError, match="crc32c changed"):
            store.read("tokens/ids", 0, 4)
        store.sums = {}
        with pytest.raises(DamagedStoreError, match=r"pickle|no metadata of Zarr v3|variable_len"):
            store.read("tokens/ids", 0, 4)
    finally:
        file.write_bytes(whole)
