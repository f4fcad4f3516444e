"""Own activations as a store: arrays of rows from files, cast, shuffled and checksummed as `cache`
does; no language model has a part in it.

Rows are shuffled in runs of up to 64 that lie beside one another (one row where the store is
small): the runs in one random order over all files, then the rows of each shard. Files are mapped
and each shard gathers its own rows, so memory does not grow with the files; what cannot be mapped
(parquet, compressed .npz) is first written out as plain rows beside the store's records.
"""

from __future__ import annotations

import logging
import os
import resource
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from glob import glob
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import ending
from ..config.base import ConfigError, UserError, check_hookpoint
from ..files import check_space, check_writable, private_folder
from ..identity import checksums, difference, digest, stamp, tell_other_versions, versions
from ..progress import progress_bar
from .array_files import Part, Source, find_sources
from .norm_limits import SAMPLE_ROWS, NormLimits, parse_ratios, row_norms, told, union
from .records import held
from .row_documents import Documents, open_documents
from .spool import mapped_stream
from .store import Geometry, Shape, make_geometry, storage_dtype
from .stored_rows import StoredRows
from .writer import StoreWriter, row_sums

logger = logging.getLogger(__name__)
Array = npt.NDArray[Any]
MAX_NORM_RATIO = "--max-norm-ratio"
_RUN_ROWS, _RUN_BYTES = 64, 1 << 16
_RUNS_A_SHARD = 64
# Each holds a shard of a hookpoint.
_MOST_THREADS = 8
_ROWS_AT_ONCE = 4096
_OPEN_FILES = 1 << 16
_SHOWN_FROM = 1 << 30  # bytes; less takes no time to speak of


class ImportOptions(NamedTuple):
    """How rows are stored."""

    dtype: str = "bfloat16"
    seed: int = 0
    shard_mib: float = 128
    documents: str | None = None  # rows a document, or a .npy file of each row's
    max_norm_ratio: tuple[str, ...] = ()  # a ratio for all hookpoints, or NAME=RATIO of some


def find_inputs(named: Sequence[str]) -> dict[str, list[Source]]:
    """`NAME=PATH` arguments -> each hookpoint's files; a name that stands there twice has the files
    of both, in that order.

    Raises ConfigError where hookpoints have other numbers of rows than one another, or the files of
    one other widths.
    """
    inputs: dict[str, list[Source]] = {}
    for argument in named:
        name, equals, pattern = argument.partition("=")
        if not equals or not pattern:
            raise ConfigError(f"{argument!r} is no NAME=PATH; write layers.3='acts/*.npy'")
        try:
            check_hookpoint(name)
        except ValueError as e:
            raise ConfigError(str(e)) from e
        inputs.setdefault(name, []).extend(find_sources(name, pattern))
    for name, sources in inputs.items():
        for other in sources[1:]:
            if other.width != sources[0].width:
                raise ConfigError(
                    f"{other.path} has width {other.width}, but {sources[0].path} of {name} "
                    f"{sources[0].width}; give each width a hookpoint of its own"
                )
    rows = {name: sum(s.rows for s in sources) for name, sources in inputs.items()}
    if len(set(rows.values())) > 1:
        told = ", ".join(f"{name} has {n:,}" for name, n in rows.items())
        raise ConfigError(
            f"hookpoints of one store are of the same rows, but {told}; check that each has all "
            "its files, or make several stores"
        )
    return inputs


class Gatherer:
    """Rows of a hookpoint by their numbers over all its files, in a store's dtype."""

    def __init__(self, parts: Sequence[Part], width: int, dtype: str) -> None:
        self.parts, self.width, self.dtype = parts, width, dtype
        self.starts = np.cumsum([0, *(len(part.array) for part in parts)])

    def pieces(self, rows: Array) -> Iterator[tuple[Part, Array, Array]]:
        """(part, numbers of rows in it, their places in `rows`), ascending in the files."""
        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        ends = np.searchsorted(wanted, self.starts)
        for number, part in enumerate(self.parts):
            for start in range(ends[number], ends[number + 1], _ROWS_AT_ONCE):
                at = slice(start, min(start + _ROWS_AT_ONCE, ends[number + 1]))
                yield part, wanted[at] - self.starts[number], order[at]

    def rows(self, rows: Array) -> StoredRows:
        """[n, width], by their numbers. Raises UserError where one is not finite."""
        out = StoredRows(
            np.empty((len(rows), self.width), storage_dtype(self.dtype)),
            np.empty(len(rows), np.float32) if self.dtype == "int8" else None,
        )
        for part, wanted, places in self.pieces(rows):
            # Files may be of the other byte order.
            found = part.array[wanted]
            found = found.astype(found.dtype.newbyteorder("="), copy=False)
            tensor = torch.from_numpy(np.ascontiguousarray(found))
            if part.dtype == "bfloat16":
                tensor = tensor.view(torch.bfloat16)
            block = StoredRows.encode(tensor, self.dtype)
            if not bool(block.tensor().isfinite().all()):
                raise self._not_finite(part, wanted, tensor, block.tensor())
            out.bits[places] = block.bits
            if out.scales is not None:
                out.scales[places] = block.scales
        return out

    def norms(self, rows: Array) -> Tensor:
        """[n] float64, of what a store holds of them."""
        return row_norms(self.rows(rows).tensor())

    def ids(self, rows: Array) -> Array:
        """Token ids [n] int32, -1 where the files have none."""
        out = np.full(len(rows), -1, dtype=np.int32)
        for part, wanted, places in self.pieces(rows):
            if part.ids is not None:
                out[places] = part.ids[wanted]
        return out

    def _not_finite(self, part: Part, wanted: Array, tensor: Tensor, cast: Tensor) -> UserError:
        # One of int8's elements that is none makes its whole row so.
        wrong = ~(cast if tensor.isfinite().all() else tensor).isfinite()
        row, column = (int(n) for n in wrong.nonzero()[0])
        value = float(tensor[row, column])
        cure = "leave that row out"
        if np.isfinite(value):
            cure = f"which {self.dtype} cannot hold: set --dtype float32, or bfloat16"
        return UserError(
            f"{part.path} has {value} in row {part.first + int(wanted[row])}, column {column}; "
            f"{cure}"
        )


class _Shuffle:
    """Which rows of the files a shard holds, in which order: a function of rows, cut and seed."""

    def __init__(self, geometry: Geometry, row_bytes: int, seed: int) -> None:
        self.geometry, self.seed = geometry, seed
        run = min(_RUN_ROWS, _RUN_BYTES // row_bytes, geometry.shard_rows // _RUNS_A_SHARD)
        self.run = max(1, run)
        self.order = np.random.default_rng(seed).permutation(-(-geometry.rows // self.run))
        sizes = np.minimum(self.run, geometry.rows - self.order * self.run)
        self.ends = np.cumsum(sizes)

    def rows(self, shard: int) -> Array:
        start, stop = self.geometry.shard_range(shard)
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left")) + 1
        firsts = self.order[first:last] * self.run
        rows = (firsts[:, None] + np.arange(self.run)).ravel()
        rows = rows[rows < np.repeat(np.minimum(firsts + self.run, self.geometry.rows), self.run)]
        skipped = start - (int(self.ends[first - 1]) if first else 0)
        rows = rows[skipped : skipped + stop - start]
        return rows[np.random.default_rng([self.seed, shard]).permutation(len(rows))]


class Importer:
    """One import: the inputs, how they are cut, and the store that they go into."""

    def __init__(
        self,
        out: str,
        inputs: dict[str, list[Source]],
        documents: Documents,
        options: ImportOptions,
    ) -> None:
        self.inputs, self.documents, self.options = inputs, documents, options
        self.widths = {name: sources[0].width for name, sources in inputs.items()}
        config = {f"import.{key}": getattr(options, key) for key in ("dtype", "seed", "shard_mib")}
        config["import.hookpoints"] = list(inputs)
        self.ratios = parse_ratios(MAX_NORM_RATIO, options.max_norm_ratio, list(inputs))
        config["import.max_norm_ratio"] = self.ratios or None
        self.limits = NormLimits()
        self.writer = StoreWriter(out, config, create=True)
        self.geometry = self._geometry()
        self.shape = Shape(self.geometry, options.dtype, self.widths)
        row_bytes = [s.width * np.dtype(_plain(s.dtype)).itemsize for s in self.sources()]
        self.shuffle = _Shuffle(self.geometry, max(row_bytes), options.seed)

    def _geometry(self) -> Geometry:
        """How the rows are cut; a store that was begun goes on as it was cut."""
        rows = sum(s.rows for s in next(iter(self.inputs.values())))
        begun = Shape.read(self.writer.records)
        if begun is not None and begun.geometry.rows == rows:
            return begun.geometry
        itemsize = storage_dtype(self.options.dtype).itemsize
        return make_geometry(rows, max(self.widths.values()), itemsize, self.options.shard_mib)

    def sources(self) -> list[Source]:
        """All inputs."""
        return [source for sources in self.inputs.values() for source in sources]

    def stamps(self) -> dict[Path, list[int]]:
        """Size, times and inode of each file: another content has another one."""
        named = [file for source in self.sources() for file in source.files]
        return {file: stamp(file) for file in [*named, *self.documents.stamps]}

    def made_of(self) -> dict[str, Any]:
        """Checksums of all that decides the rows. Reads each file once, ever."""
        found: dict[str, Any] = {"import.run_rows": self.shuffle.run}
        sizes = {file: stamp(file)[0] for source in self.sources() for file in source.files}
        sums: dict[Path, list[list[str]]] = {}
        total = sum(sizes.values())
        with progress_bar("checksums", total, "bytes", total > _SHOWN_FROM) as bar:
            for file, size in sizes.items():
                sums[file] = checksums(file)
                bar.advance(size)
        for name, sources in self.inputs.items():
            found[f"rows of {name}"] = digest([_content(source, sums) for source in sources])
        found["--documents"] = self.documents.rows_each
        if self.documents.numbers is not None:
            found["--documents"] = digest(checksums(Path(str(self.options.documents)).expanduser()))
        return found

    def check_space(self) -> None:
        """Raises ConfigError where the disk cannot take what is missing."""
        if not self.writer.records.local:
            return
        needed = sum(source.stream_bytes for source in self.sources())
        for name in self.shape.arrays():
            row_bytes = self.shape.row_bytes(name)
            for shard in self.writer.missing(self.shape):
                needed += self.geometry.file_bytes(shard, row_bytes)
        root = self.writer.records.root
        # Streams that an earlier launch has written out.
        spooled = (Path(root) / "records" / "import").glob("*.npy")
        needed = max(0, needed - sum(file.stat().st_size for file in spooled))
        check_space("the store", root, needed, "what is left of the import")

    def gatherers(self, spool: Path) -> dict[str, Gatherer]:
        """Each hookpoint's rows, streams written out first."""
        total = sum(s.rows for s in self.sources() if s.blocks is not None)
        parts: dict[str, list[Part]] = {}
        with progress_bar("read streams", total, "rows", total > 0) as bar:
            for name, sources in self.inputs.items():
                for s in sources:
                    here = s.parts if s.blocks is None else mapped_stream(s, spool, bar.advance)
                    parts.setdefault(name, []).extend(here)
        return {
            name: Gatherer(found, self.widths[name], self.options.dtype)
            for name, found in parts.items()
        }

    def find_limits(self, gatherers: dict[str, Gatherer]) -> None:
        """Measures the median norms of the first rows, or reads what the first launch found."""
        records = self.writer.records
        found = NormLimits.read(records) if self.ratios else self.limits
        if found is None:
            shards = range(
                min(self.geometry.num_shards, -(-SAMPLE_ROWS // self.geometry.shard_rows))
            )
            rows = np.concatenate([self.shuffle.rows(shard) for shard in shards])[:SAMPLE_ROWS]
            norms = {name: gatherers[name].norms(rows) for name in self.ratios}
            found = NormLimits.of(MAX_NORM_RATIO, self.ratios, norms)
            found.write(records)
        self.limits = found

    def write(self, shard: int, gatherers: dict[str, Gatherer]) -> None:
        """Writes a shard, one hookpoint after another: memory holds one. Where rows are left out
        they are read twice, first for their norms.
        """
        rows = self.shuffle.rows(shard)
        over = self.limits.over({n: gatherers[n].norms(rows) for n in self.limits.ratios})
        left_out = union(over)
        document, place = self.documents.of(rows)
        with_text = [g for g in gatherers.values() if any(p.ids is not None for p in g.parts)]
        tokens = {
            "tokens/ids": (with_text or list(gatherers.values()))[0].ids(rows),
            "tokens/document": document,
            "tokens/position": place,
        }
        write_shard(
            self.writer,
            self.geometry,
            shard,
            gatherers,
            lambda h: gatherers[h].rows(rows).without(left_out),
            tokens,
            over=over,
        )


def run_import(out: str, named: Sequence[str], options: ImportOptions) -> str:
    """Imports `NAME=PATH` arguments into a store, or what is left of them; returns what was done in
    a sentence.

    Raises ConfigError before any work where something does not fit, UserError where a row is not
    finite or a file changes meanwhile.
    """
    if "=" in out and glob(expanduser(out.partition("=")[2].partition("::")[0])):
        raise ConfigError(f"{out!r} stands where the store to make is named; write OUT.zarr before")
    if not named:
        raise ConfigError("no NAME=PATH is given; write layers.3='acts/*.npy'")
    _raise_open_files()
    inputs = find_inputs(named)
    job = Importer(out, inputs, open_documents(options.documents, inputs), options)
    root = job.writer.records.root
    if job.writer.records.local:
        check_writable("the store", root)
    with held(job.writer.records, out):
        return _fill(job)


def _fill(job: Importer) -> str:
    writer, geometry = job.writer, job.geometry
    writer.restore_config()
    before = writer.identity()
    stamps, made_of = job.stamps() | job.documents.stamps, job.made_of()
    if before is not None and (other := difference(before.get("inputs", {}), made_of)):
        raise ConfigError(
            f"{writer.path} is made of other files: {other}; name another store, or remove that one"
        )
    if writer.is_complete():
        return f"{writer.path} is complete; nothing to do"
    job.check_space()
    if before is not None:
        tell_other_versions(f"the first part of {writer.path}", before["versions"])
    _tell_casts(job)
    # The rows' own checksums are their identity: in other files they are the same rows.
    identity = {"parts": {}, "inputs": made_of, "versions": versions()}
    files = {n: [str(s.path.absolute()) for s in found] for n, found in job.inputs.items()}
    about = {"config": writer.config, "imported_from": files, "versions": versions()}
    writer.create(geometry, job.widths, job.options.dtype, about, identity=identity)
    todo = writer.missing(job.shape)
    if todo:
        writer.reopen()
        spool = _spool_folder(job)
        gatherers = job.gatherers(spool)
        job.find_limits(gatherers)
        write_shards(writer, geometry, todo, lambda shard: job.write(shard, gatherers), "import")
        if job.stamps() != stamps:
            raise UserError(
                f"a file changed while it was imported; remove {writer.path} and import anew"
            )
        shutil.rmtree(spool, ignore_errors=True)
    writer.finish(geometry, list(job.widths), job.documents.count(geometry.rows))
    done = f"{writer.path}: {geometry.rows:,} rows of {', '.join(job.widths)}"
    if job.ratios:
        over = writer.left_out(geometry)
        done += f"; {told(MAX_NORM_RATIO, geometry.rows, over)}"
    return done


def write_shard(
    writer: StoreWriter,
    geometry: Geometry,
    shard: int,
    hookpoints: Iterable[str],
    rows: Callable[[str], StoredRows],
    tokens: Mapping[str, Array],
    crcs: Mapping[str, int] | None = None,
    sums: Mapping[str, Tensor] | None = None,
    over: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Writes hookpoints of a shard one by one, and tokens, and records it. crcs and sums: those of
    arrays whose files are there already; over: as StoreWriter.record_shard takes it.
    """
    crcs, sums = dict(crcs or {}), dict(sums or {})
    for hookpoint in hookpoints:
        stored = rows(hookpoint)
        sums[hookpoint] = row_sums(stored.tensor())
        for name, values in stored.arrays(hookpoint).items():
            crcs[name] = writer.write_rows(geometry, shard, name, values)
    for name, values in tokens.items():
        crcs[name] = writer.write_rows(geometry, shard, name, values)
    writer.record_shard(geometry, shard, crcs, sums, over)


def write_shards(
    writer: StoreWriter,
    geometry: Geometry,
    todo: Sequence[int],
    write: Callable[[int], None],
    title: str,
) -> None:
    """Writes shards on a few threads, told to stop by a signal between two. Raises
    ending.StopRequested.
    """
    waiting: deque[tuple[int, Future[None]]] = deque()
    done = geometry.num_shards - len(todo)
    total = sum(stop - start for start, stop in map(geometry.shard_range, todo))
    threads = max(2, min(_MOST_THREADS, (os.cpu_count() or 2) // 2))

    def note() -> None:
        told = f"{done} of {geometry.num_shards} shards are kept in {writer.path}"
        ending.keeps(f"{told}, and the same command makes the others")

    note()
    with (
        ending.deferred(),
        progress_bar(title, total, "rows", True) as bar,
        ThreadPoolExecutor(threads, thread_name_prefix="shard") as pool,
    ):
        for shard in [*todo, None]:
            while waiting and (shard is None or len(waiting) >= threads):
                number, future = waiting.popleft()
                future.result()
                start, stop = geometry.shard_range(number)
                bar.advance(stop - start)
                done += 1
                note()
            if signal := ending.requested():
                name = ending.name_of(signal)
                raise ending.StopRequested(signal, f"stopped by {name}; {ending.kept()}")
            if shard is not None:
                waiting.append((shard, pool.submit(write, shard)))


def _plain(dtype: str) -> str:
    return "uint16" if dtype == "bfloat16" else dtype


def _content(source: Source, sums: dict[Path, list[list[str]]]) -> list[Any]:
    """Checksums of a source's rows; names of files have no part in it."""
    found: list[Any] = [source.rows, source.width, source.dtype, source.context]
    for file in source.files:
        # Of a safetensors file one a tensor, of others one of all their arrays.
        for name, value in sums[file]:
            if name in ("", source.key):
                found.append([value, source.key if name == "" else ""])
    return found


def _spool_folder(job: Importer) -> Path:
    """Where streams are written out as plain rows."""
    if job.writer.records.local:
        return Path(job.writer.records.root) / "records" / "import"
    return private_folder() / f"import-{digest(job.made_of())}"


def _tell_casts(job: Importer) -> None:
    for name, sources in job.inputs.items():
        other = sorted({s.dtype for s in sources} - {job.options.dtype})
        if other:
            logger.info("%s: %s is cast to %s", name, " and ".join(other), job.options.dtype)


def _raise_open_files() -> None:
    """Each mapped file is an open one, of which a process often has 1024 by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
