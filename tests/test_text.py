"""Text becomes the same sequences everywhere; what is not stored is marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from flash_sae_dist.activations.documents import documents
from flash_sae_dist.activations.text import held_out_table, token_table
from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.config.data import TextConfig
from tests.tiny_model import save_bert, save_llama, save_text


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("text")
    save_llama(root / "llama")
    save_bert(root / "bert")
    save_text(root / "text.jsonl")
    return root


def source(root: Path) -> TextConfig:
    return TextConfig(source="files", paths=(str(root / "text.jsonl"),))


def texts(cfg: TextConfig) -> list[str | None]:
    return [d.text for d in documents(cfg, None)]


def words(root: Path) -> list[list[str]]:
    lines = (root / "text.jsonl").read_text().splitlines()
    return [json.loads(line)["text"].split() for line in lines]


def test_packed_sequences_hold_every_token_in_order(root: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "llama")
    table = token_table(
        source(root),
        tokenizer,
        context_length=16,
        causal=True,
        drop_special_tokens=True,
        num_rows=10**9,
    )
    assert (table.ids[:, 0] == tokenizer.bos_token_id).all()
    kept = tokenizer.convert_ids_to_tokens(table.ids[table.keep].tolist())
    assert kept == [w for doc in words(root) for w in doc][: len(kept)]
    assert not np.isin(table.ids[table.keep], tokenizer.all_special_ids).any()
    texts = words(root)
    places = zip(table.document[table.keep], table.position[table.keep], strict=True)
    assert kept == [texts[d][p] for d, p in places]


def test_special_tokens_can_stay(root: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    table = token_table(
        source(root),
        tokenizer,
        context_length=16,
        causal=True,
        drop_special_tokens=False,
        num_rows=100,
    )
    assert table.keep.all()


def test_separate_sequences_pad_each_document(root: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(root / "bert")
    table = token_table(
        source(root),
        tokenizer,
        context_length=16,
        causal=False,
        drop_special_tokens=True,
        num_rows=10**9,
    )
    assert (table.ids[:, 0] == tokenizer.cls_token_id).all()
    kept = tokenizer.convert_ids_to_tokens(table.ids[table.keep].tolist())
    assert kept == [w for doc in words(root) for w in doc]
    assert (table.ids[~table.attention] == tokenizer.pad_token_id).all()
    assert (~table.attention).any()
    for row in table.document:
        assert len(set(row[row >= 0])) == 1, "a sequence holds one document"


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_held_out_follows_what_is_cached(root: Path, kind: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(root / kind)
    args: dict[str, Any] = {
        "context_length": 16,
        "causal": kind == "llama",
        "drop_special_tokens": True,
    }
    everything = token_table(source(root), tokenizer, **args, num_rows=10**9)
    cached = token_table(source(root), tokenizer, **args, num_rows=500)
    n = int(cached.document.max()) + 1
    seen: list[str] = []

    def counting(batch: list[str], **options: Any) -> Any:
        seen.extend(batch)
        return tokenizer(batch, **options)

    for name in ("bos_token_id", "eos_token_id", "all_special_ids"):
        setattr(counting, name, getattr(tokenizer, name))
    for name in ("cls_token_id", "sep_token_id", "pad_token_id"):
        setattr(counting, name, getattr(tokenizer, name))
    held = held_out_table(source(root), counting, **args, after_documents=n, num_sequences=5)
    texts = words(root)
    kept = tokenizer.convert_ids_to_tokens(held.ids[held.keep].tolist())
    places = zip(held.document[held.keep], held.position[held.keep], strict=True)
    assert kept == [texts[d][p] for d, p in places]
    assert held.document[held.keep].min() == n, "the first document that was not cached"
    assert [seen[0].split(), len(seen)] == [texts[n], len(texts) - n], "the others are passed over"
    last = held_out_table(source(root), tokenizer, **args, after_documents=59, num_sequences=5)
    assert np.array_equal(last.ids, everything.ids[-5:]), "where the text ends, its last ones"


def test_sources(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    pq.write_table(pa.table({"body": ["three", "four"]}), tmp_path / "c.parquet")
    txt = TextConfig(source="files", paths=(str(tmp_path / "*.txt"),))
    assert texts(txt) == ["one", "two"]
    parquet = TextConfig(source="files", paths=(str(tmp_path / "c.parquet"),), column="body")
    assert texts(parquet) == ["three", "four"]
    assert sum(map(len, texts(TextConfig(source="pydoc")))) > 300_000


def test_hub_source_reads_a_local_dataset(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    cfg = TextConfig(source="hub", name=str(tmp_path), split="train")
    assert texts(cfg) == ["one", "two"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"paths": ("nowhere/*.txt",)}, "nowhere"),
        ({"column": "body"}, "'body' is not in line 1 of .*text.jsonl; it has text"),
        ({"paths": ("{tmp}/bad.jsonl",)}, "bad.jsonl cannot be read: .*line 1"),
        ({"paths": ("{tmp}/latin.txt",)}, "latin.txt cannot be read: 'utf-8'"),
        ({"paths": ("{tmp}/torn.parquet",)}, "torn.parquet cannot be read"),
        ({"paths": ("{tmp}/number.jsonl",)}, "text.column='text' holds a int in line 2"),
        ({"paths": ("{tmp}/list.jsonl",)}, "it has no columns"),
        ({"paths": ("{tmp}/empty.txt",)}, "gave no text"),
        ({"paths": ("nosuch://a.txt",)}, "'nosuch://a.txt' cannot be reached: .*nosuch"),
        ({"paths": ("{tmp}/x.csv",), "column": "body"}, "body' is not in the first row of .*x.csv"),
        ({"paths": ("{tmp}/x.json",)}, "x.json is no .txt"),
        ({"source": "hub", "name": "{tmp}/no-dataset"}, "no-dataset' cannot be loaded"),
        ({"source": "hub", "name": "no/such-dataset"}, "text.name='no/such-dataset' cannot be"),
        ({"source": "hub", "name": "{tmp}", "split": "tset"}, "text.split"),
    ],
)
def test_bad_sources_are_told(
    root: Path, tmp_path: Path, change: dict[str, Any], word: str
) -> None:
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "number.jsonl").write_text('{"text": null}\n{"text": 3}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "x.csv").write_text("text\none\n")
    (tmp_path / "x.json").write_text("[]")

    def placed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(placed(v) for v in value)
        return value.replace("{tmp}", str(tmp_path)) if isinstance(value, str) else value

    cfg = source(root).model_copy(update={k: placed(v) for k, v in change.items()})
    with pytest.raises(ConfigError, match=word) as e:
        texts(cfg)
    assert "\n" not in str(e.value)


def test_nulls_and_blank_lines_are_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "one"}\n')
    pq.write_table(pa.table({"text": ["two", None]}), tmp_path / "b.parquet")
    cfg = TextConfig(source="files", paths=(f"{tmp_path}/*",))
    assert texts(cfg) == ["one", "two"]


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_text_of_special_tokens_alone_is_told(tmp_path: Path, root: Path, kind: str) -> None:
    """It made a store of no rows that called itself complete."""
    (tmp_path / "a.txt").write_text("unheard of " * 20)
    args: dict[str, Any] = {"context_length": 16, "causal": kind == "llama", "num_rows": 100}
    text = TextConfig(source="files", paths=(str(tmp_path / "a.txt"),))
    tokenizer = AutoTokenizer.from_pretrained(root / kind)
    with pytest.raises(ConfigError, match=r"special tokens alone.*cache\.drop_special_tokens"):
        token_table(text, tokenizer, **args, drop_special_tokens=True)
    table = token_table(text, tokenizer, **args, drop_special_tokens=False)
    assert table.keep.any()


def test_text_shorter_than_a_sequence_is_told(tmp_path: Path, root: Path) -> None:
    (tmp_path / "a.txt").write_text("word1 word2")
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    with pytest.raises(ConfigError, match=r"cache\.context_length=16"):
        token_table(
            TextConfig(source="files", paths=(str(tmp_path / "a.txt"),)),
            tokenizer,
            context_length=16,
            causal=True,
            drop_special_tokens=True,
            num_rows=100,
        )


def test_half_an_emoji_is_replaced_and_told_once(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cut.jsonl"
    lines = [r'{"text": "word1 \ud83d word2"}', r'{"text": "\ud83d\ude00"}', r'{"text": "\ude00"}']
    file.write_text("\n".join(lines) + "\n")
    cfg = TextConfig(source="files", paths=(str(file),))
    assert texts(cfg) == ["word1 \ufffd word2", "\U0001f600", "\ufffd"]
    assert caplog.text.count("lone surrogates") == 1
    tokenizer = AutoTokenizer.from_pretrained(root / "llama")
    options: dict[str, Any] = {"causal": True, "drop_special_tokens": True, "num_rows": 2}
    assert token_table(cfg, tokenizer, context_length=4, **options).keep.any()


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.txt").write_bytes(mark + b"three")
    cfg = TextConfig(source="files", paths=(str(tmp_path / "*"),))
    assert texts(cfg) == ["one", "two", "three"]


def test_what_a_tokenizer_raises_is_one_sentence(root: Path) -> None:
    class Broken:
        all_special_ids: tuple[int, ...] = ()
        cls_token_id = bos_token_id = sep_token_id = eos_token_id = pad_token_id = None

        def __call__(self, *_: Any, **__: Any) -> None:
            raise TypeError("TextEncodeInput must be\na text")

    with pytest.raises(ConfigError, match="tokenizer fails on a document .*TextEncodeInput must"):
        token_table(
            source(root),
            Broken(),
            context_length=4,
            causal=False,
            drop_special_tokens=True,
            num_rows=2,
        )
