"""Every kind of source gives its documents in one order, from any place on, or one sentence."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import logging
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

import datasets
import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flash_sae_dist.activations import sources, text_files
from flash_sae_dist.activations.documents import Document, documents
from flash_sae_dist.activations.harvest import run_cache
from flash_sae_dist.activations.origin import _text_stamp, text_is_here
from flash_sae_dist.activations.records import Records
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.data import TextConfig, TextPart
from flash_sae_dist.training.job import parse_config
from tests.tiny_model import WORDS, config_data, save_bert, save_llama, token_table

PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: bytes(pa.compress(data, codec="zstd", asbytes=True)),
}
# Quotes, newlines, separators, a mark, an astral character.
TEXTS = [
    "word1 word2",
    'word3 "quoted", word4\nword5',
    "word6; naïve 東京 \U0001f600",
    "",
    "w,x\n\ny",
]
CHAT = [{"role": "user", "content": "word1"}, {"role": "assistant", "content": "word2"}]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(save_llama(tmp_path_factory.mktemp("llama")))


def files(*paths: Path, **keys: Any) -> TextConfig:
    return TextConfig(source="files", paths=tuple(map(str, paths)), **keys)


def texts(cfg: TextConfig, tokenizer: Any = None, skip: int = 0) -> list[str | None]:
    return [d.text for d in documents(cfg, tokenizer, skip)]


def file_bytes(kind: str, rows: list[str | None]) -> bytes:
    if kind == ".jsonl":
        return "".join(json.dumps({"text": row}) + "\n" for row in rows).encode()
    if kind == ".csv":
        out = io.StringIO(newline="")
        csv.writer(out).writerows([["n", "text"], *([i, row] for i, row in enumerate(rows))])
        return out.getvalue().encode()
    if kind == ".parquet":
        sink = io.BytesIO()
        pq.write_table(pa.table({"text": pa.array(rows, pa.string())}), sink)
        return sink.getvalue()
    return "\n".join(row or "" for row in rows).encode()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, kind: str, packing: str) -> None:
    file = tmp_path / f"A{kind.upper()}{packing}"
    file.write_bytes(PACKINGS[packing](file_bytes(kind, list(TEXTS))))
    if kind == ".parquet" and packing:
        with pytest.raises(ConfigError, match="cannot be read by parts; decompress it"):
            texts(files(file))
        return
    expected = ["\n".join(TEXTS)] if kind == ".txt" else [t for t in TEXTS if t]
    assert texts(files(file)) == expected


@pytest.mark.parametrize("packing", [p for p in PACKINGS if p])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_a_cut_or_foreign_compressed_file_is_one_sentence(
    tmp_path: Path, kind: str, packing: str
) -> None:
    data = PACKINGS[packing](file_bytes(kind, list(TEXTS) * 50))
    for content in (data[: len(data) // 2], data[:-3], b"no such format at all"):
        file = tmp_path / f"a{kind}{packing}"
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"text\.paths: .* cannot be read: .* leave it out"):
            texts(files(file))


def test_concatenated_frames_are_one_file(tmp_path: Path) -> None:
    for packing in PACKINGS:
        file = tmp_path / f"a.jsonl{packing}"
        file.write_bytes(2 * PACKINGS[packing](file_bytes(".jsonl", ["word1", "word2"])))
        assert texts(files(file)) == ["word1", "word2"] * 2, packing


def test_byte_order_marks_and_windows_line_ends(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    for kind in (".txt", ".jsonl", ".csv"):
        plain, other = tmp_path / f"a{kind}", tmp_path / f"b{kind}.gz"
        content = file_bytes(kind, ["word1", "word2"])
        plain.write_bytes(content)
        other.write_bytes(gzip.compress(mark + content.replace(b"\r", b"").replace(b"\n", b"\r\n")))
        assert texts(files(plain)) == texts(files(other)), kind


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "b', "line 2: Unterminated string"),
        ("a.jsonl", "[" * 100_000, "cannot be read: .*recursion"),
        ("a.csv", 'text\n"never closed', "line 2: unexpected end of data"),
        ("a.csv", "text,n\na,1\nb\n", "line 3 has 1 fields, the first row 2"),
        ("a.csv", 'text\n"a"b\n', "line 2: ',' expected"),
        ("a.csv", "", "text.column='text' is not in the first row of .*; it has no columns"),
        ("a.csv", "body,n\na,1\n", "it has body, n"),
        ("a.jsonl", '{"text": [{"role": "user"}]}', "or give text.messages_column for chats"),
        ("a.jsonl", '{"text": [1, 2]}', "or give text.tokens_column for token ids"),
    ],
)
def test_bad_files_are_told(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words) as e:
        texts(files(tmp_path / name))
    assert "\n" not in str(e.value)


def test_a_long_csv_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "word1 " * 50_000 + "\n")
    assert [len(t or "") for t in texts(files(tmp_path / "a.csv"))] == [300_000]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a folder; name its files, such as .*/\*\.jsonl"):
        texts(files(tmp_path))


def saved(folder: Path, rows: list[str | None]) -> None:
    data = datasets.Dataset.from_dict({"n": list(range(len(rows))), "text": rows})
    data.save_to_disk(folder / "one")
    datasets.DatasetDict(train=data, test=data.select([0])).save_to_disk(folder / "dict")


def test_folders_of_save_to_disk(tmp_path: Path) -> None:
    saved(tmp_path, ["word1", None, "word2"])
    one = TextConfig(source="hub", name=str(tmp_path / "one"))
    assert texts(one) == ["word1", "word2"]
    several = TextConfig(source="hub", name=str(tmp_path / "dict"))
    assert texts(several) == ["word1", "word2"]
    assert texts(several.model_copy(update={"split": "test"})) == ["word1"]
    with pytest.raises(ConfigError, match=r"no text\.split='valid'; it has test, train"):
        texts(several.model_copy(update={"split": "valid"}))
    with pytest.raises(ConfigError, match=r"saved without splits, so text\.split='valid'"):
        texts(one.model_copy(update={"split": "valid"}))
    with pytest.raises(ConfigError, match=r"text\.column='body' is not in text\.name=.*n, text"):
        texts(one.model_copy(update={"column": "body"}))


# --- from any place on


def all_sources(root: Path, rows: list[str | None]) -> dict[str, TextConfig]:
    """One config for each kind of source, of files that hold rows in several files."""
    for kind in (".txt", ".jsonl", ".csv", ".parquet"):
        for packing in ("", ".zst", ".gz"):
            if kind != ".parquet" or not packing:
                for part, some in enumerate((rows[: len(rows) // 2], rows[len(rows) // 2 :])):
                    data = PACKINGS[packing](file_bytes(kind, some))
                    (root / f"{part}{kind}{packing}").write_bytes(data)
    saved(root, rows)
    (root / "hub").mkdir()
    (root / "hub" / "data.jsonl").write_bytes(file_bytes(".jsonl", rows))
    found = {f"files {p.name[1:]}": files(root / f"*{p.name[1:]}") for p in root.glob("0.*")}
    for streaming in (True, False):
        hub = TextConfig(source="hub", name=str(root / "hub"), streaming=streaming)
        found[f"hub {streaming}"] = hub
    found["saved"] = TextConfig(source="hub", name=str(root / "one"))
    found["pydoc"] = TextConfig(source="pydoc")
    parts = [TextPart(source="files", paths=(str(root / f"*{k}"),)) for k in (".jsonl", ".txt")]
    found["mixture"] = TextConfig(source="mixture", mixture=tuple(parts))
    return found


def test_skip_goes_on_behind_a_record_in_every_source(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blank rows, nulls and empty lines are records, too, and every piece of a long .txt is one."""
    monkeypatch.setattr(text_files, "PIECE", 16)
    rows = [None, "word1 word2", "  ", "", "word3", *WORDS[:20], None, " ".join(WORDS), ""]
    for name, cfg in all_sources(tmp_path, rows).items():
        every = list(documents(cfg, tokenizer))
        places = [d.records for d in every]
        assert places == sorted(set(places)), name
        for skip in {0, 1, 2, len(every) // 2, *places[::7], places[-1]}:
            behind = [d for d in every if d.records > skip]
            assert list(documents(cfg, tokenizer, skip)) == behind, (name, skip)


def test_records_that_are_passed_over_are_not_parsed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"torn\n' * 5 + '{"text": "word1"}\n')
    assert texts(files(tmp_path / "a.jsonl"), skip=5) == ["word1"]
    rows = ["word1"] * 3
    for name in "bc":
        (tmp_path / f"{name}.parquet").write_bytes(file_bytes(".parquet", list(rows)))
    data = (tmp_path / "b.parquet").read_bytes()
    at = data.index(b"word1")
    (tmp_path / "b.parquet").write_bytes(data[:at] + b"\xff" * 5 + data[at + 5 :])
    assert texts(files(tmp_path / "*.parquet"), skip=3) == rows


# --- long files


def pieces(content: str) -> list[Document]:
    source = sources.Source(TextConfig(source="pydoc"), None, "text")
    rows = text_files._txt(io.BytesIO(content.encode()), source, "x")
    return [Document(*row(), 0) for row in rows]


@given(st.text(alphabet="ab1 \n.,_é", max_size=200), st.integers(1, 40))
@settings(deadline=None)
def test_pieces_are_the_whole(content: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "PIECE", size)
        found = pieces(content)
    assert "".join(d.text or "" for d in found) == content
    assert all(len(d.text or "") <= 2 * size for d in found)
    first = next((i for i, d in enumerate(found) if not (d.text or "").isspace()), len(found))
    assert [d.continues for d in found] == [i > first for i in range(len(found))]


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_file_is_one_document(tmp_path: Path, causal: bool, tokenizer: Any) -> None:
    """The same table, whatever the size of the pieces."""
    if not causal:
        tokenizer = AutoTokenizer.from_pretrained(save_bert(tmp_path / "bert"))
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("\n ".join(WORDS * 5))
    tables = []
    for size in (10**6, 100, 31):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(text_files, "PIECE", size)
            options: dict[str, Any] = {"causal": causal, "num_rows": 10**9}
            tables.append(
                token_table(
                    files(tmp_path / "*.txt"),
                    tokenizer,
                    context_length=16,
                    drop_special_tokens=True,
                    **options,
                )
            )
    for table in tables[1:]:
        for key in ("ids", "document", "position", "attention", "keep"):
            assert np.array_equal(getattr(table, key), getattr(tables[0], key)), key
    assert set(tables[0].document[tables[0].keep]) == {0, 1}


def test_a_long_file_is_read_only_as_far_as_it_is_needed(tmp_path: Path, tokenizer: Any) -> None:
    file = tmp_path / "a.txt"
    file.write_text("\n".join(WORDS) * 20_000)  # 7 MB
    reached = 0

    class Watched(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            nonlocal reached
            count = super().readinto(buffer)
            reached = max(reached, self.tell())
            return count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fsspec.implementations.local.LocalFileSystem.open",
            lambda self, path, mode: io.BufferedReader(Watched(path, "rb")),
        )
        tracemalloc.start()
        try:
            table = token_table(
                files(file),
                tokenizer,
                context_length=16,
                causal=True,
                drop_special_tokens=True,
                num_rows=2000,
            )
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert table.keep.sum() >= 2000
    assert reached < 1 << 20
    assert peak < 64 << 20


def test_reading_a_long_file_takes_the_memory_of_a_piece(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("word1 word2\n" * 1_000_000)  # 12 MB
    tracemalloc.start()
    try:
        assert sum(len(d.text or "") for d in documents(files(file), None)) == 12_000_000
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


# --- token ids and chats


def test_token_ids_are_taken_as_they_stand(tmp_path: Path, tokenizer: Any) -> None:
    rows = [[5, 6, 7], None, [], [8]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"ids": row}) + "\n" for row in rows))
    pq.write_table(pa.table({"ids": pa.array(rows, pa.list_(pa.int32()))}), tmp_path / "a.parquet")
    for path in tmp_path.glob("a.*"):
        found = list(documents(files(path, tokens_column="ids"), tokenizer))
        assert [(d.text, d.ids, d.records) for d in found] == [
            (None, [5, 6, 7], 1),
            (None, [8], 4),
        ]
    options: dict[str, Any] = {"context_length": 4, "causal": True, "num_rows": 9}
    table = token_table(
        files(file, tokens_column="ids"), tokenizer, drop_special_tokens=True, **options
    )
    assert table.ids.tolist() == [[0, 5, 6, 7], [0, 1, 8, 1]]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([5, 54], "token id 54 in line 1 of .* ids 0 .. 53 alone"),
        ([-1], "token id -1"),
        ([2**40], "token id 1099511627776"),
        ("word1", "something else than a list of token ids"),
        ([1.5], "something else than a list of token ids"),
        ([[1], [2, 3]], "something else than a list of token ids"),
        ([True], "something else than a list of token ids"),
        ([1, None], "something else than a list of token ids"),
    ],
)
def test_wrong_token_ids_are_told(tmp_path: Path, tokenizer: Any, value: Any, words: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"ids": value}))
    with pytest.raises(ConfigError, match=words):
        list(documents(files(tmp_path / "a.jsonl", tokens_column="ids"), tokenizer))


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {{ eos_token }}{% endfor %}"
)


def test_chats_become_text_by_the_template(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": CHAT}))
    cfg = files(tmp_path / "a.jsonl", messages_column="chat")
    with pytest.raises(ConfigError, match=r"text\.messages_column='chat' needs a .* chat template"):
        texts(cfg, tokenizer)
    talking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talking.chat_template = TEMPLATE
    assert texts(cfg, talking) == ["<s>user word1 </s>assistant word2 </s>"]
    options: dict[str, Any] = {"context_length": 4, "causal": True, "num_rows": 9}
    table = token_table(cfg, talking, drop_special_tokens=True, **options)
    special = talking.bos_token_id
    assert table.ids.tolist()[0].count(special) == 2, "each sequence's own and the template's"
    pq.write_table(pa.table({"chat": [CHAT]}), tmp_path / "b.parquet")
    assert texts(files(tmp_path / "b.parquet", messages_column="chat"), talking) == texts(
        cfg, talking
    )


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("word1", "list of messages with role and content in line 1"),
        ([{"from": "human", "value": "x"}], r"\(from, value\)"),
        ([3], r"\(a int\)"),
        ([{"role": "tool", "content": "x"}], "template fails in line 1 .*no tools"),
    ],
)
def test_wrong_chats_are_told(tmp_path: Path, tokenizer: Any, value: Any, words: str) -> None:
    talking = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    talking.chat_template = TEMPLATE
    (tmp_path / "a.jsonl").write_text(json.dumps({"chat": value}))
    with pytest.raises(ConfigError, match=words):
        texts(files(tmp_path / "a.jsonl", messages_column="chat"), talking)


# --- mixtures


def mixture(root: Path, weights: list[float], sizes: list[int]) -> TextConfig:
    """Parts of documents of the words `p0`, `p1`, ..., of a size each part has."""
    parts = []
    for i, (weight, size) in enumerate(zip(weights, sizes, strict=True)):
        file = root / f"{i}-{size}.jsonl"
        file.write_text((json.dumps({"text": " ".join([f"word{i}"] * size)}) + "\n") * 400)
        parts.append(TextPart(source="files", paths=(str(file),), weight=weight))
    return TextConfig(source="mixture", mixture=tuple(parts))


@given(
    st.lists(st.tuples(st.floats(0.2, 5), st.integers(1, 30)), min_size=1, max_size=4),
)
@settings(deadline=None, max_examples=20)
def test_shares_of_a_mixture_hold_to_within_a_document(
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[tuple[float, int]],
) -> None:
    root = tmp_path_factory.mktemp("mixture")
    weights, sizes = [p[0] for p in parts], [p[1] for p in parts]
    cfg = mixture(root, weights, sizes)
    words = [(d.text or "").split() for d in documents(cfg, tokenizer)]
    assert texts(cfg, tokenizer) == [" ".join(w) for w in words], "the same every time"
    drawn, left = np.zeros(len(parts)), np.full(len(parts), 400)
    for document in words:
        i = int(document[0].removeprefix("word"))
        drawn[i] += len(document)
        left[i] -= 1
        if not left.all():
            break
        shares = drawn / np.array(weights)
        most = max(size / weight for weight, size in parts)
        # A thousandth for the rates, which are measured over characters.
        assert np.ptp(shares) <= most * 1.001 + 1e-9
    assert len(words) == 400 * len(parts), "parts that end leave the rest to the others"


def test_a_part_that_ends_is_told(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = mixture(tmp_path, [1, 3], [5, 5])
    with caplog.at_level(logging.INFO, "flash_sae_dist"):
        found = texts(cfg, tokenizer)
    assert caplog.text.count("text.mixture.1 ends after 400 documents") == 1
    assert set(found[-200:]) == {" ".join(["word0"] * 5)}


def test_mistakes_in_a_part_name_it(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    good = TextPart(source="pydoc")
    for part, words in (
        (TextPart(source="files", paths=("nowhere/*.txt",)), r"text\.mixture\.1\.paths: 'nowhere"),
        (
            TextPart(source="files", paths=(str(tmp_path / "blank.jsonl"),)),
            r"text\.mixture\.1\.source='files' gave no text; check text\.mixture\.1\.column='text'",
        ),
        (
            TextPart(source="files", paths=("x",), messages_column="m"),
            r"text\.mixture\.1\.messages_column='m' needs a tokenizer",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            texts(TextConfig(source="mixture", mixture=(good, part)), tokenizer)


# --- connections that break


class Stream:
    """A dataset's stream of ten rows that breaks after some rows, a number of times."""

    column_names = None

    def __init__(self, at: int, breaks: list[Exception]) -> None:
        self.at, self.breaks, self.start = at, breaks, 0

    def skip(self, count: int) -> Stream:
        other = Stream(self.at, self.breaks)
        other.start = count
        return other

    def __iter__(self) -> Iterator[dict[str, str]]:
        for i in range(self.start, 10):
            if i == self.at and self.breaks:
                raise self.breaks.pop()
            yield {"text": f"word{i}"}


HUB = TextConfig(source="hub", name="some/dataset")
BROKEN = [httpx.ReadTimeout("The read\noperation timed out"), ConnectionError("Server gone")]


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stream], None]:
    monkeypatch.setattr(sources, "WAITS_S", (0.0, 0.0))

    def use(stream: Stream) -> None:
        monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: stream)

    return use


@pytest.mark.parametrize("error", BROKEN)
def test_a_broken_stream_is_opened_again(
    opened: Callable[[Stream], None], error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    opened(Stream(5, [error, error]))
    assert texts(HUB) == [f"word{i}" for i in range(10)]
    assert caplog.text.count("the connection broke after 5 documents") == 2


def test_a_stream_that_goes_on_has_as_many_tries(opened: Callable[[Stream], None]) -> None:
    """Also where it breaks before its first new row: it was reached once."""
    opened(Stream(5, [BROKEN[0]] * 2))
    assert texts(HUB, skip=5) == [f"word{i}" for i in range(5, 10)]
    opened(Stream(5, [BROKEN[0]] * 3))
    with pytest.raises(UserError, match="broke after 5 documents, and at each of 2 tries"):
        texts(HUB, skip=5)


def test_a_stream_that_breaks_again_and_again_is_told(opened: Callable[[Stream], None]) -> None:
    opened(Stream(5, [BROKEN[0]] * 3))
    found: list[Document] = []
    with pytest.raises(UserError, match="broke after 5 documents, and at each of 2 tries") as e:
        found.extend(documents(HUB, None))
    assert not isinstance(e.value, ConfigError)
    assert "\n" not in str(e.value)
    assert [d.text for d in found] == [f"word{i}" for i in range(5)]
    opened(Stream(5, []))
    assert texts(HUB, skip=found[-1].records) == [f"word{i}" for i in range(5, 10)]


def test_a_stream_that_never_began_or_is_damaged_is_no_broken_one(
    opened: Callable[[Stream], None],
) -> None:
    opened(Stream(0, [BROKEN[0]] * 9))
    with pytest.raises(ConfigError, match=r"text\.name='some/dataset' cannot be reached"):
        texts(HUB)
    breaks: list[Exception] = [ValueError("not a parquet file")] * 9
    opened(Stream(5, breaks))
    with pytest.raises(ConfigError, match="cannot be read on after 5 rows: ValueError: not a par"):
        texts(HUB)
    assert len(breaks) == 8, "no second try"


@pytest.mark.parametrize(
    ("status", "again"), [(404, False), (403, False), (429, True), (503, True)]
)
def test_answers_of_servers(status: int, again: bool) -> None:
    request = httpx.Request("GET", "http://x")
    error = httpx.HTTPStatusError("x", request=request, response=httpx.Response(status))
    assert sources.is_transient(error) == again
    wrapped = RuntimeError("x")
    wrapped.__cause__ = error
    assert sources.is_transient(wrapped) == again
    assert not sources.is_transient(FileNotFoundError("x"))


# --- identity


def test_the_stamp_knows_every_key_and_every_file(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text('{"text": "word1"}\n')
    first, second = (TextPart(source="files", paths=(str(tmp_path / f"{n}.jsonl"),)) for n in "ab")
    configs = [
        TextConfig(source="pydoc"),
        files(tmp_path / "a.jsonl"),
        files(tmp_path / "a.jsonl", tokens_column="x"),
        files(tmp_path / "a.jsonl", messages_column="x"),
        TextConfig(source="mixture", mixture=(first, second)),
        TextConfig(source="mixture", mixture=(second, first)),
        TextConfig(source="mixture", mixture=(first, second.model_copy(update={"weight": 2.0}))),
    ]
    stamps = [json.dumps(_text_stamp(cfg)) for cfg in configs]
    assert len(set(stamps)) == len(stamps)
    (tmp_path / "b.jsonl").write_text('{"text": "another word"}\n')
    changed = [json.dumps(_text_stamp(cfg)) for cfg in configs]
    same = [a == b for a, b in zip(stamps, changed, strict=True)]
    assert list(takewhile(bool, same)) == [True] * 4
    assert same[4:] == [False] * 3


def test_text_of_the_hub_is_not_here(tmp_path: Path) -> None:
    assert text_is_here(TextConfig(source="pydoc"))
    assert text_is_here(TextConfig(source="hub", name=str(tmp_path)))
    assert not text_is_here(HUB)
    parts = (TextPart(source="pydoc"), TextPart(source="hub", name="some/dataset"))
    assert not text_is_here(TextConfig(source="mixture", mixture=parts))


# --- revisions


def test_a_revision_is_asked_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(name: str, subset: str | None, **how: Any) -> Stream:
        asked.append((name, how["revision"]))
        return Stream(10, [])

    monkeypatch.setattr("datasets.load_dataset", load)
    texts(HUB)
    texts(HUB.model_copy(update={"revision": "v1.2"}))
    assert asked == [("some/dataset", None), ("some/dataset", "v1.2")]


def test_a_revision_of_what_has_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text.revision='v1' is that of a dataset of the hub"):
        TextConfig(source="files", paths=("a.txt",), revision="v1")
    cfg = TextConfig(source="hub", name=str(tmp_path), revision="v1")
    with pytest.raises(ConfigError, match="text.revision='v1': .* is a folder, which has none"):
        texts(cfg)


def test_a_finished_store_is_of_one_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: Stream(10, []))
    data = config_data(tmp_path, num_tokens=8, context_length=4, hookpoints=["model.layers.0"])
    data["text"] = {"source": "hub", "name": "some/dataset", "revision": "v1"}

    def cache(**text: str) -> None:
        run_cache(parse_config(data | {"text": data["text"] | text}), Accelerator(cpu=True))

    cache()
    record = Records(str(tmp_path / "store.zarr")).read("config.json")
    assert record is not None
    assert record["text.revision"] == "v1"
    cache()
    for key, value in (("revision", "v2"), ("name", "other/dataset")):
        with pytest.raises(ConfigError, match=f"text.{key}='{value}' differs from"):
            cache(**{key: value})
