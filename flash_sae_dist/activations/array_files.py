"""Arrays [rows, width] in files that others wrote: .npy, .npz, .safetensors, .pt, .parquet, and
folders of Arrow files. They are mapped, not read, where their format lets them be; no object of a
pickle is ever made.
"""

from __future__ import annotations

import glob
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os.path import expanduser
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..config.base import ConfigError, nearest_name

Array = npt.NDArray[Any]
SUFFIXES = (".npy", ".npz", ".safetensors", ".pt", ".parquet")
_FLOATS = ("float16", "float32", "float64")
_BLOCK_BYTES = 1 << 25


class Part(NamedTuple):
    """Consecutive rows of a file, mapped."""

    path: Path
    first: int  # number in the file of its first row
    array: Array  # [rows, width]; bfloat16 as uint16 bits
    dtype: str
    ids: Array | None = None  # [rows] token ids


class Source(NamedTuple):
    """Rows of one file, or of one folder of Arrow files.

    A stream has blocks [rows, width] to be read in order in place of parts.
    """

    path: Path
    rows: int
    width: int
    dtype: str  # bfloat16, float16, float32 or float64
    files: tuple[Path, ...]  # that hold them
    key: str | None = None  # the array that is read, of a file that may hold several
    context: int = 1  # rows an item of the file, such as a sequence's
    parts: tuple[Part, ...] = ()
    blocks: Callable[[], Iterator[Array]] | None = None

    @property
    def stream_bytes(self) -> int:
        """Bytes of a stream as plain rows; 0 for what is mapped."""
        return 0 if self.blocks is None else self.rows * self.width * np.dtype(self.dtype).itemsize


def find_sources(name: str, pattern: str) -> list[Source]:
    """The files that `PATTERN` or `PATTERN::KEY` names, in sorted order. Raises ConfigError."""
    text, _, key = pattern.partition("::")
    if "://" in text:
        raise ConfigError(
            f"{name}={text!r} is a URL; copy the files to a disk, which can be mapped"
        )
    text = expanduser(text)
    # A file whose own name has brackets is no pattern.
    found = [text] if Path(text).exists() else sorted(glob.glob(text, recursive=True))
    if not found:
        raise ConfigError(f"{name}={text!r} names no file; check the path, and put a * in quotes")
    return [open_source(Path(path), key or None, name) for path in found]


def open_source(path: Path, key: str | None, name: str) -> Source:
    """Opens a file or folder: the array `key`, or that of the hookpoint's name, or the only one.

    Raises ConfigError for what are no rows of floats.
    """
    from .arrow_files import open_folder, open_parquet

    readers = {".npy": _npy, ".npz": _npz, ".safetensors": _safetensors, ".pt": _pt}
    if path.is_dir():
        return open_folder(path, key, name)
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one of them")
    try:
        if path.suffix == ".parquet":
            return open_parquet(path, key, name)
        return readers[path.suffix](path, key, name)
    except ConfigError:
        raise
    except OSError as e:
        raise ConfigError(f"{path} cannot be read: {e.strerror or e}; check it") from e
    except Exception as e:  # each library has errors of its own for a torn or foreign file
        told = " ".join(str(e).split())[:200]
        raise ConfigError(
            f"{path} is no whole {path.suffix} file of plain numbers ({told}); objects are never "
            "unpickled: save the rows anew as an array of floats"
        ) from e


def open_numbers(path: Path) -> Array:
    """A file's only array of whole numbers [rows], mapped. Raises ConfigError."""
    if path.suffix != ".npy":
        raise ConfigError(f"{path} is no .npy file of whole numbers; save them with numpy.save")
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} cannot be read: {' '.join(str(e).split())}") from e
    if found.ndim != 1 or found.dtype.kind not in "iu":
        raise ConfigError(
            f"{path} holds {found.dtype} of shape {list(found.shape)}; it has to be one whole "
            "number a row"
        )
    return np.asarray(found)


def choose(path: Path, known: Sequence[str], key: str | None, name: str) -> str:
    """Which of a file's arrays is meant. Raises ConfigError."""
    if key is not None and key not in known:
        raise ConfigError(f"{path} has no array {key!r}{nearest_name(key, list(known))}")
    if key is None and name not in known and len(known) != 1:
        first = ", ".join(sorted(known)[:8])
        example = f"{name}={path}::{min(known)}" if known else "another file"
        raise ConfigError(
            f"{path} holds {len(known)} arrays ({first}), none of them {name!r}; name one, "
            f"as in {example}"
        )
    return key or (name if name in known else known[0])


def check_rows(path: Path, shape: Sequence[int], dtype: str) -> None:
    """Raises ConfigError for an array that is no [rows, width] of floats."""
    if len(shape) != 2 or 0 in shape:
        raise ConfigError(
            f"{path} holds an array of shape {list(shape)}, not [rows, width]; reshape it and save "
            "it anew"
        )
    if dtype not in (*_FLOATS, "bfloat16"):
        raise ConfigError(
            f"{path} holds {dtype}; rows are float64, float32, float16 or (in .safetensors and "
            ".pt) bfloat16"
        )


def _mapped(path: Path, array: Array, dtype: str, key: str | None = None) -> Source:
    check_rows(path, array.shape, dtype)
    rows, width = array.shape
    part = Part(path, 0, array, dtype)
    return Source(path, rows, width, dtype, (path,), key, parts=(part,))


def _npy(path: Path, key: str | None, name: str) -> Source:
    if key is not None:
        raise ConfigError(f"{path} holds one array without a name; drop ::{key}")
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return _mapped(path, array, array.dtype.name)


def _npz(path: Path, key: str | None, name: str) -> Source:
    """What numpy.savez wrote is mapped inside the archive; what is compressed is a stream."""
    with zipfile.ZipFile(path) as archive:
        members = {i.filename[:-4]: i for i in archive.infolist() if i.filename.endswith(".npy")}
        key = choose(path, list(members), key, name)
        info = members[key]
        with archive.open(info) as file:
            shape, by_columns, dtype = _npy_header(file)
            header = file.tell()
    check_rows(path, shape, dtype.name)
    if info.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as raw:
            raw.seek(info.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), "<u2")
        start = info.header_offset + 30 + int(lengths.sum()) + header
        order: Any = "F" if by_columns else "C"
        return _mapped(path, np.memmap(path, dtype, "r", start, shape, order), dtype.name, key)
    if by_columns:
        raise ConfigError(f"{path} holds a compressed array in Fortran order; save it in C order")
    rows, width = shape
    blocks = partial(_npz_blocks, path, info.filename)
    return Source(path, rows, width, dtype.name, (path,), key, blocks=blocks)


def _npz_blocks(path: Path, member: str) -> Iterator[Array]:
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        (rows, width), _, dtype = _npy_header(file)
        at_once = max(1, _BLOCK_BYTES // (width * dtype.itemsize))
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            data = file.read(count * width * dtype.itemsize)
            yield np.frombuffer(data, dtype).reshape(count, width)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    form: Any = np.lib.format
    if form.read_magic(file) == (1, 0):
        return form.read_array_header_1_0(file)  # type: ignore[no-any-return]
    return form.read_array_header_2_0(file)  # type: ignore[no-any-return]


def _safetensors(path: Path, key: str | None, name: str) -> Source:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        chosen = choose(path, list(file.keys()), key, name)
        tensor = file.get_tensor(chosen)
    return _of_tensor(path, tensor, chosen)


def _pt(path: Path, key: str | None, name: str) -> Source:
    found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if isinstance(found, dict):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        key = choose(path, list(tensors), key, name)
        found = tensors[key]
    elif key is not None:
        raise ConfigError(f"{path} holds no dict of tensors; drop ::{key}")
    if not isinstance(found, Tensor):
        raise ConfigError(f"{path} holds a {type(found).__name__}; save a tensor or a dict of them")
    return _of_tensor(path, found, key)


def _of_tensor(path: Path, tensor: Tensor, key: str | None) -> Source:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if tensor.layout != torch.strided:
        raise ConfigError(f"{path} holds a {tensor.layout} tensor; save it dense")
    check_rows(path, tensor.shape, dtype)
    bits = tensor.detach()
    bits = bits.view(torch.uint16) if bits.dtype == torch.bfloat16 else bits
    return _mapped(path, bits.numpy(), dtype, key)
