"""What the formats share: files read with every check, and written under temporary names.

Their checksums are in a file of their own, which the other libraries pass over. Nothing is
unpickled but tensors and plain values.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .. import tensor_files
from ..files import CHECKSUMS, check_checksums, replacing, write_checksums, write_text

_UNREADABLE = (OSError, ValueError, RuntimeError, SafetensorError, EOFError, KeyError)


def no_whole(path: Path, error: BaseException | str) -> ValueError:
    """The error of a file that is missing or damaged."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"{path} holds no whole SAE ({reason}); download or export it anew")


def check(folder: Path) -> None:
    """Compares a folder's files with their checksums where there are some. Raises ValueError."""
    try:
        check_checksums(folder)
    except _UNREADABLE as e:
        raise no_whole(folder, e) from e


def read_config(file: Path) -> dict[str, Any]:
    """A JSON or YAML file of keys. Raises ValueError where it is none."""
    try:
        text = file.read_text(encoding="utf-8")
        config = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as e:
        raise no_whole(file.parent, e) from e
    if not isinstance(config, dict):
        raise no_whole(file.parent, f"{file.name} holds no keys")
    return config


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file. Raises ValueError where it is damaged."""
    try:
        return load_file(file)
    except _UNREADABLE as e:
        raise no_whole(file, e) from e


def read_npz(file: Path) -> dict[str, Tensor]:
    """The arrays of a .npz file. Raises ValueError where it is damaged or holds objects."""
    try:
        with np.load(file, allow_pickle=False) as arrays:
            if not isinstance(arrays, np.lib.npyio.NpzFile):
                raise ValueError("it is no .npz file")
            return {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (*_UNREADABLE, TypeError, zipfile.BadZipFile) as e:
        raise no_whole(file, e) from e


def read_pt(file: Path, *, mapped: bool = False) -> dict[str, Any]:
    """What torch.save wrote of tensors and plain values. Raises ValueError where it is damaged or
    holds anything else, of which none is run. mapped reads no tensor before it is used.
    """
    try:
        with file.open("rb") as opened:
            mapped = mapped and opened.read(4) == b"PK\x03\x04"
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except UnpicklingError as e:
        raise ValueError(
            f"{file} holds more than tensors and plain values, which is not read; save its "
            "state_dict alone"
        ) from e
    except Exception as e:
        # Flipped bytes make its unpickler raise errors of any kind.
        raise no_whole(file, e) from e
    if not isinstance(found, dict):
        raise no_whole(file, f"it holds a {type(found).__name__}, not tensors by name")
    return {str(name): value for name, value in found.items()}


def pt_names(file: Path, wanted: str) -> set[str]:
    """Names in a .pt file, none where it cannot be read, or where wanted is not among them."""
    try:
        names = set(read_pt(file, mapped=True))
    except ValueError:
        return set()
    return names if wanted in names else set()


def tensors(
    path: Path, found: Mapping[str, Any], needed: Collection[str], optional: Collection[str] = ()
) -> dict[str, Tensor]:
    """The tensors that a format has and no others. Raises ValueError naming what is missing or
    unknown.
    """
    names = set(found)
    if not set(needed) <= names or not names <= {*needed, *optional}:
        raise ValueError(
            f"{path} has tensors {sorted(names)}, not {sorted(needed)}; it is no SAE of that "
            "architecture"
        )
    wrong = [name for name in sorted(names) if not isinstance(found[name], Tensor)]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} is no tensor; download or export it anew")
    return dict(found)


def check_keys(file: Path, config: Mapping[str, Any], allowed: Mapping[str, object]) -> None:
    """Raises ValueError where a key has a value that is not read; a missing one is the first
    allowed."""
    for key, values in allowed.items():
        choices = values if isinstance(values, tuple) else (values,)
        value = config.get(key, choices[0])
        # 1 and True are equal.
        if not any(type(value) is type(c) and value == c for c in choices):
            only = " or ".join(map(repr, choices))
            raise ValueError(f"{file}: {key}={value!r}, but only {only} is read here")


def write_safetensors(file: Path, weights: Mapping[str, Tensor]) -> None:
    """Writes tensors, renamed into place."""
    with replacing(file) as partial:
        tensor_files.save(partial, {n: t.detach().contiguous() for n, t in weights.items()})


def write_pt(file: Path, values: Mapping[str, Any]) -> None:
    """Writes tensors and plain values as torch.save does, renamed into place."""
    plain = {
        name: value.detach().cpu().contiguous() if isinstance(value, Tensor) else value
        for name, value in values.items()
    }
    with replacing(file) as partial:
        torch.save(plain, partial)


def write_npz(file: Path, arrays: Mapping[str, Tensor]) -> None:
    """Writes arrays, renamed into place."""
    with replacing(file) as partial, partial.open("wb") as out:
        named: dict[str, Any] = {name: t.detach().cpu().numpy() for name, t in arrays.items()}
        np.savez(out, **named)


def write_config(file: Path, config: Mapping[str, Any]) -> None:
    """Writes keys as JSON or YAML, by the file's suffix."""
    if file.suffix == ".yaml":
        write_text(file, yaml.safe_dump(dict(config), sort_keys=False))
    else:
        write_text(file, json.dumps(config, indent=2) + "\n")


def begin(folder: Path) -> None:
    """Drops the checksums of what a folder held before: they are written last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CHECKSUMS).unlink(missing_ok=True)


def seal(folder: Path, names: list[str]) -> None:
    """Writes the checksums of what was written."""
    write_checksums(folder, names)
