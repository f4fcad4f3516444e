"""Several stores as one: of the same rows with other hookpoints, side by side, or of the same
hookpoints with other rows, behind one another.

A shard that is whole in one of the stores, and cut as the new store's, is linked (copied where that
cannot be); all others are written anew.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config.base import ConfigError
from ..files import check_space, check_writable, replacing
from ..identity import difference, digest, tell_other_versions, versions
from . import merged_text
from .importing import write_shard, write_shards
from .merged_text import Behind
from .metadata import attributes
from .records import COMPLETE, held, shard_record
from .row_documents import MAX_DOCUMENT
from .store import TOKEN_ARRAYS, ActivationStore, Geometry, Shape, TextShape, shard_path
from .stored_rows import StoredRows
from .writer import StoreWriter

Array = npt.NDArray[Any]
_CUT = ("rows", "shard_rows", "chunk_rows")


class Piece(NamedTuple):
    """Consecutive rows of an array of a store."""

    store: ActivationStore
    start: int
    stop: int
    first_document: int  # added to the numbers of its documents


class Merge:
    """What a merged store holds, and where it comes from. Raises ConfigError for stores that do not
    fit.
    """

    def __init__(self, stores: Sequence[ActivationStore]) -> None:
        self.stores, self.first = stores, stores[0]
        names = [set(store.widths) for store in stores]
        self.behind = all(other == names[0] for other in names)
        _check_dtypes(stores)
        if self.behind:
            _check_other_rows(stores)
        else:
            _check_same_rows(stores)
        self.widths = {h: w for store in stores for h, w in store.widths.items()}
        ends = np.cumsum([0, *(s.rows for s in stores)]) if self.behind else [0, self.first.rows]
        self.starts = [int(end) for end in ends]
        cut = self.first.geometry
        self.geometry = Geometry(self.starts[-1], cut.shard_rows, cut.chunk_rows)
        self.documents = [store.num_documents() for store in stores if self.behind]
        if sum(self.documents) >= MAX_DOCUMENT:
            raise ConfigError(
                f"the stores have {sum(self.documents):,} documents, and numbers end at 2**31 - 1; "
                "import them with more rows a document (--documents)"
            )
        self.shape = Shape(self.geometry, self.first.dtype, self.widths)

    def pieces(self, name: str, start: int, stop: int) -> Iterator[Piece]:
        """Where rows of an array of the merged store lie."""
        if not self.behind:
            kind, _, hookpoint = name.partition("/")
            has = (s for s in self.stores if kind == "tokens" or hookpoint in s.widths)
            yield Piece(next(has), start, stop, 0)
            return
        for number, store in enumerate(self.stores):
            first, after = self.starts[number], self.starts[number + 1]
            a, b = max(start, first), min(stop, after)
            if a < b:
                yield Piece(store, a - first, b - first, sum(self.documents[:number]))

    def linkable(self, name: str, shard: int) -> tuple[ActivationStore, int] | None:
        """The store and shard whose file is the merged store's, too; None where there is none."""
        found = list(self.pieces(name, *self.geometry.shard_range(shard)))
        store, start, stop, first_document = found[0]
        if len(found) > 1 or (name == "tokens/document" and first_document):
            return None
        cut = store.geometry
        if not store.records.local or cut[1:] != self.geometry[1:] or start % cut.shard_rows:
            return None
        number = start // cut.shard_rows
        return (store, number) if cut.shard_range(number) == (start, stop) else None

    def rows(self, name: str, shard: int) -> Array:
        """The rows of a shard, read and compared with their checksums."""
        found = []
        for store, start, stop, first_document in self.pieces(
            name, *self.geometry.shard_range(shard)
        ):
            rows = store.read_stored(name, start, stop)
            shifted = name == "tokens/document" and first_document
            found.append(rows + np.int32(first_document) if shifted else rows)
        return found[0] if len(found) == 1 else np.concatenate(found)

    def stored(self, hookpoint: str, shard: int) -> StoredRows:
        """A hookpoint's rows of a shard."""
        scales = self.rows(f"scales/{hookpoint}", shard) if self.first.dtype == "int8" else None
        return StoredRows(self.rows(f"activations/{hookpoint}", shard), scales)

    def over(self, shard: int) -> dict[str, list[int]]:
        """Rows of a shard that are left out, as StoreWriter.record_shard takes them."""
        first, after = self.geometry.shard_range(shard)
        found: dict[str, list[int]] = {}
        for number, store in enumerate(self.stores):
            start = self.starts[number] if self.behind else 0
            for name, rows in store.over.items():
                here = rows[(rows >= first - start) & (rows < after - start)] + start - first
                found.setdefault(name, []).extend(here.tolist())
        return found

    def config(self) -> dict[str, Any]:
        """The keys in which all configs agree; the hookpoints of all."""
        configs = [store.config for store in self.stores]
        found = {k: v for k, v in configs[0].items() if all(c.get(k) == v for c in configs)}
        return found | {"merge.hookpoints": list(self.widths), "merge.rows": self.geometry.rows}

    def identity(self) -> dict[str, Any]:
        """What the rows are made of, as far as all stores tell; else the rows are known by
        themselves.
        """
        made = [store.made_of() for store in self.stores]
        all_parts = [m["parts"] for m in made]
        parts: dict[str, Any] = {}
        if all(all_parts):
            parts = {k: v for k, v in all_parts[0].items() if all(p.get(k) == v for p in all_parts)}
            parts |= {"hookpoints": self.widths}
            # Older stores tell there how they are cut.
            cut = self.geometry._asdict()
            parts |= {key: value for key, value in cut.items() if key in all_parts[0]}
            if self.behind:
                parts["merged"] = [digest(p) for p in all_parts]
        inputs = {"stores": [m["rows"] for m in made]}
        return {"parts": parts, "inputs": inputs, "versions": versions()}

    def about(self) -> dict[str, Any]:
        """The attributes of the merged store."""
        each = [attributes(store.records, store.sums) for store in self.stores]
        same = {k: v for k, v in each[0].items() if all(a.get(k) == v for a in each)}
        paths = [store.records.root for store in self.stores]
        told = {"config": self.config(), "merged_from": paths, "versions": versions()}
        return same | told

    def texts(self) -> list[Behind]:
        """The stores whose token tables come behind one another; one of the same rows stands for
        all.
        """
        if not self.behind:
            has = [store for store in self.stores if store.text_shape() is not None]
            return [Behind((has or list(self.stores))[0], 0, 0)]
        before = [sum(self.documents[:n]) for n in range(len(self.stores))]
        return [Behind(*each) for each in zip(self.stores, self.starts, before, strict=False)]

    def num_documents(self) -> int:
        """Documents of all stores whose rows follow one another."""
        return sum(self.documents) if self.behind else self.first.num_documents()


def run_merge(out: str, paths: Sequence[str], *, copy: bool = False) -> str:
    """Merges stores into a new one, or does what is left of it; returns what was done in a
    sentence.

    copy: no hard links. Raises ConfigError before any work where the stores do not fit one another.
    """
    if len(paths) < 2:
        raise ConfigError("fewer than two stores are given; name those to be merged behind OUT")
    merge = Merge([ActivationStore.open(path) for path in paths])
    writer = StoreWriter(out, merge.config(), create=True)
    root = writer.records.root
    if root in [store.records.root for store in merge.stores]:
        raise ConfigError(f"OUT={out!r} is one of the stores; name another")
    if writer.records.local:
        check_writable("OUT", root)
    with held(writer.records, out):
        return _fill(writer, merge, copy)


def _fill(writer: StoreWriter, merge: Merge, copy: bool) -> str:
    writer.restore_config()
    before, identity = writer.identity(), merge.identity()
    if before is not None:
        if other := difference(before.get("inputs", {}), identity["inputs"]):
            raise ConfigError(
                f"{writer.path} is made of other stores: {other}; name another, or remove that one"
            )
        tell_other_versions(f"the first part of {writer.path}", before["versions"])
    if writer.is_complete():
        return f"{writer.path} is complete; nothing to do"
    links, texts = _Links(writer, merge, copy), merge.texts()
    shape = merged_text.shape_of([text.store for text in texts])
    links.check_space(shape)
    about, dtype = merge.about(), merge.first.dtype
    writer.create(merge.geometry, merge.widths, dtype, about, identity=identity, text=shape)
    if "text" not in (writer.begun() or {}):
        shape = None  # begun by a version that kept no table
    todo = writer.missing(merge.shape)
    if todo:
        writer.reopen()
        write_shards(writer, merge.geometry, todo, links.write, "merge")
    # The identity has the digest of stores of one text already; several are known by their own.
    text = None if shape is None else (merged_text.write(writer.records, shape, texts), None)
    writer.finish(merge.geometry, list(merge.widths), merge.num_documents(), text)
    linked = sum(links.linked.values())
    of = len(merge.shape.arrays()) * merge.geometry.num_shards
    how = "copied" if copy else "linked or copied"
    return (
        f"{writer.path}: {merge.geometry.rows:,} rows of {', '.join(merge.widths)}; "
        f"{linked} of {of} files {how} unread (`flash-sae verify` reads them), the others written "
        "anew"
    )


class _Links:
    """Puts shards into the merged store."""

    def __init__(self, writer: StoreWriter, merge: Merge, copy: bool) -> None:
        self.writer, self.merge, self.copy = writer, merge, copy
        self.names = merge.shape.arrays()
        self.linked: dict[int, int] = {}  # shard -> files

    def _source(self, name: str, shard: int) -> tuple[ActivationStore, int] | None:
        return self.merge.linkable(name, shard) if self.writer.records.local else None

    def check_space(self, text: TextShape | None) -> None:
        """Raises ConfigError where the disk cannot take what is written or copied."""
        if not self.writer.records.local:
            return
        root = Path(self.writer.records.root)
        device, needed = _device(root), 0
        if text is not None:
            stores = [behind.store for behind in self.merge.texts()]
            needed = merged_text.num_tokens(stores, text) * merged_text.BYTES_A_TOKEN
        for name in self.names:
            row_bytes = self.merge.shape.row_bytes(name)
            for shard in self.writer.missing(self.merge.shape):
                source = self._source(name, shard)
                apart = source and _device(Path(source[0].records.root)) != device
                if source is None or self.copy or apart:
                    needed += self.merge.geometry.file_bytes(shard, row_bytes)
        check_space("OUT", root, needed, "what is left of the merge")

    def write(self, shard: int) -> None:
        """A shard of all arrays, in whichever way."""
        crcs: dict[str, int] = {}
        sums: dict[str, Tensor] = {}
        for name in self.names:
            if (source := self._source(name, shard)) is None:
                continue
            store, number = source
            self._place(Path(store.shard_file(name, number)), name, shard)
            record = store.records.read(shard_record(number)) or {}
            crcs[name] = record["crc32c"][name]
            kind, _, hookpoint = name.partition("/")
            if kind == "activations":
                where = f"statistics/{hookpoint}/shard_sums"
                sums[hookpoint] = torch.from_numpy(store.read(where, number, number + 1)[0])
        hookpoints = [h for h in self.merge.widths if h not in sums]
        tokens = [n for n in self.names if n.startswith("tokens/") and n not in crcs]
        write_shard(
            self.writer,
            self.merge.geometry,
            shard,
            hookpoints,
            lambda hookpoint: self.merge.stored(hookpoint, shard),
            {name: self.merge.rows(name, shard) for name in tokens},
            crcs,
            sums,
            self.merge.over(shard),
        )
        self.linked[shard] = len(crcs)

    def _place(self, file: Path, name: str, shard: int) -> None:
        target = Path(self.writer.records.root, shard_path(name, shard))
        target.parent.mkdir(parents=True, exist_ok=True)
        if not self.copy:
            target.unlink(missing_ok=True)
            try:
                os.link(file, target)
                return
            except OSError:
                pass  # another disk, or a file system without links
        with replacing(target) as copied:
            shutil.copyfile(file, copied)


def _device(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return path.stat().st_dev


def _check_dtypes(stores: Sequence[ActivationStore]) -> None:
    for other in stores[1:]:
        if other.dtype != stores[0].dtype:
            raise ConfigError(
                f"{other.path} holds {other.dtype}, {stores[0].path} {stores[0].dtype}; a "
                "store has one type: make one of them anew"
            )


def _check_other_rows(stores: Sequence[ActivationStore]) -> None:
    """Rows behind one another are of one model and of other text."""
    from .origin import MODEL_PARTS

    first = stores[0]
    seen: dict[str | None, str] = {}
    for store in stores:
        made = store.made_of()
        if (same := seen.get(made["rows"])) is not None and made["rows"] is not None:
            raise ConfigError(f"{store.path} and {same} hold the same rows; leave one out")
        seen[made["rows"]] = store.path
        for hookpoint, width in store.widths.items():
            if width != first.widths[hookpoint]:
                raise ConfigError(
                    f"{hookpoint} has width {width} in {store.path}, {first.widths[hookpoint]} in "
                    f"{first.path}; they are of other models"
                )
        if other := difference(first.made_of()["parts"], made["parts"], MODEL_PARTS):
            raise ConfigError(
                f"{store.path} is of another model than {first.path}: {other}; merge stores of one"
            )


def _check_same_rows(stores: Sequence[ActivationStore]) -> None:
    """Hookpoints side by side are of the same rows in the same order."""
    first = stores[0]
    seen: dict[str, str] = {}
    for store in stores:
        for hookpoint in store.widths:
            if hookpoint in seen:
                raise ConfigError(
                    f"{hookpoint} is in {seen[hookpoint]} and in {store.path}, but not all their "
                    "hookpoints are the same; merge stores of other or of the same hookpoints"
                )
            seen[hookpoint] = store.path
        if store.rows != first.rows:
            raise ConfigError(
                f"{store.path} has {store.rows:,} rows, {first.path} {first.rows:,}; hookpoints of "
                "one store are of the same rows"
            )
        skip = {"hookpoints", *_CUT}
        parts, others = first.made_of()["parts"], store.made_of()["parts"]
        if other := difference(parts, others, (parts.keys() & others.keys()) - skip):
            raise ConfigError(f"{store.path} is made of other things than {first.path}: {other}")
        if not np.array_equal(store.left_out, first.left_out):
            raise ConfigError(
                f"{store.path} and {first.path} leave out other rows for their norms "
                "(max_norm_ratio); make one store of their hookpoints"
            )
        if name := _other_tokens(first, store):
            raise ConfigError(
                f"{store.path} and {first.path} hold other rows, or the same in another order "
                f"({name} differs); make both from the same rows with the same seed and shard_mib"
            )


def _other_tokens(a: ActivationStore, b: ActivationStore) -> str | None:
    """The first array of tokens in which two stores differ."""
    contents = [(s.records.read(COMPLETE) or {}).get("content", {}) for s in (a, b)]
    for name in (f"tokens/{n}" for n in TOKEN_ARRAYS):
        if a.geometry == b.geometry and all(name in content for content in contents):
            if contents[0][name] != contents[1][name]:
                return name
            continue
        for shard in range(a.geometry.num_shards):
            rows = a.geometry.shard_range(shard)
            if not np.array_equal(a.read(name, *rows), b.read(name, *rows)):
                return name
    return None
