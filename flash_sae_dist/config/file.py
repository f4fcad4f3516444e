"""Config files: YAML in, one clear sentence out when something does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .base import ConfigError, OneOf, element_models, nearest_name, one_of, section_models, shown

M = TypeVar("M", bound=BaseModel)
# What a type is called in YAML, with an example, by pydantic's name for the error.
_WANTED = {
    "int_type": "write a whole number, such as 4096",
    "float_type": "write a number, such as 0.001",
    "string_type": "write text, in quotes where YAML takes it for something else",
    "bool_type": "write true or false",
    "tuple_type": "write a list, such as [a, b]",
    "dict_type": "write `key: value` lines",
    "model_type": "write a section of `key: value` lines",
}
_EMPTY = {
    "string_too_short": "write a name or a path",
    "too_short": "write a list of at least one, such as [a]",
}


def _known_fields(
    model: type[BaseModel], path: tuple[Any, ...], data: Any
) -> tuple[list[str], OneOf | None]:
    """The keys of the section that a path of data leads to, and how its model was chosen."""
    choice: OneOf | None = None
    for part in path:
        data = data[part]
        if isinstance(part, int):
            continue  # the elements of a list are of the model that its name led to
        choice = one_of(model, part)
        sections = section_models(model, part) or element_models(model, part)
        model = choice.model_of(data) if choice else sections[0]
    return list(model.model_fields), choice


def _unknown_key(error: ErrorDetails, model: type[BaseModel], data: Any) -> str:
    loc = error["loc"]
    key = ".".join(map(str, loc))
    fields, choice = _known_fields(model, loc[:-1], data)
    if choice and (tags := choice.tags_with(str(loc[-1]))):
        return (
            f"{key}={shown(error['input'])} needs {choice.section}.{choice.tag}="
            f"{' or '.join(tags)}; drop it, or change {choice.section}.{choice.tag}"
        )
    known = [".".join(map(str, (*loc[:-1], name))) for name in fields]
    return f"unknown key {key!r} (value {shown(error['input'])}){nearest_name(key, known)}"


def _sentence(error: ErrorDetails, model: type[BaseModel], data: Any) -> str:
    loc = tuple(p for p in error["loc"])
    key = ".".join(str(p) for p in loc)
    if error["type"] == "extra_forbidden":
        return _unknown_key(error, model, data)
    if error["type"] == "missing" and isinstance(loc[-1], int):
        key = ".".join(map(str, loc[:-1]))
        return f"{key}={shown(error['input'])} is too short; write {loc[-1] + 1} values or more"
    if error["type"] == "missing":
        # The keys of a list's elements are told once, by the names of the section that holds it.
        known = key if all(isinstance(p, str) for p in loc) else f"{loc[0]}.{loc[-1]}"
        return f"key {key!r} is missing; add it (`flash-sae keys {known}` tells what it means)"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message
    told = f"{key}={shown(error['input'])}"
    if error["type"] == "literal_error":
        choices = [
            c.strip("', ") for c in error["ctx"]["expected"].replace(" or ", ", ").split(", ")
        ]
        return f"{told} is not a choice{nearest_name(str(error['input']), choices)}"
    if error["type"] in _EMPTY:
        return f"{told} is empty; {_EMPTY[error['type']]}"
    if error["type"] in _WANTED:
        return f"{told} is of the wrong type; {_WANTED[error['type']]}"
    return f"{told} does not fit: {message[0].lower()}{message[1:]}"


def parse(model: type[M], data: dict[str, Any], source: str) -> M:
    """Builds a config from plain data. Raises ConfigError telling the first mistake."""
    try:
        return model.model_validate(data)
    except ValidationError as e:
        # A typing mistake (an unknown key) explains the missing one beside it, so it is told first.
        first = min(e.errors(), key=lambda err: err["type"] != "extra_forbidden")
        raise ConfigError(f"{source}: {_sentence(first, model, data)}") from None


def _cut(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} ..."


class _UniqueKeys(yaml.SafeLoader):
    """YAML's own rule, which PyYAML does not check: it keeps the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key.value!r} stands there twice (line {line})"
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


# What no config comes near: aliases of aliases stand for more values than any memory holds.
_MAX_DEPTH, _MAX_VALUES, _MAX_BYTES = 50, 100_000, 4 << 20


def _read_yaml(text: str) -> Any:
    """Plain data of YAML. Raises YAMLError for whatever PyYAML fails at, and for text that is too
    deep, too large with its aliases, or holds what no path and no terminal takes.
    """
    try:
        loader = _UniqueKeys(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _count_values(node, {}, _MAX_DEPTH)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError:
        raise
    except RecursionError:
        raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} deep") from None
    # PyYAML's constructors raise what int(), datetime() and the like do: 2024-13-45.
    except Exception as e:
        raise yaml.YAMLError(f"{type(e).__name__}: {e}") from None


def _count_values(node: yaml.Node, counted: dict[int, int], depth: int) -> int:
    """Values below a node, an alias counted as what it stands for."""
    if depth == 0:
        raise RecursionError
    if id(node) in counted:
        if counted[id(node)] < 0:
            raise yaml.YAMLError("an alias (*) stands inside what it stands for")
        return counted[id(node)]
    counted[id(node)] = -1
    number = 1
    if isinstance(node, yaml.ScalarNode):
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in node.value):
            raise yaml.YAMLError(f"{node.value!r} holds a NUL or half a character; drop it")
    elif isinstance(node, yaml.CollectionNode):
        for part in node.value:
            for value in part if isinstance(part, tuple) else (part,):
                number += _count_values(value, counted, depth - 1)
    if number > _MAX_VALUES:
        raise yaml.YAMLError(f"it holds more than {_MAX_VALUES:,} values, aliases (*) followed")
    counted[id(node)] = number
    return number


def apply_override(data: dict[str, Any], override: str) -> None:
    """Sets one `dotted.key=value` (value read as YAML) in place. Raises ConfigError on a malformed
    one.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"override {override!r} is not of the form key=value, such as train.batch_tokens=4096"
        )
    try:
        value = _read_yaml(text)
    except yaml.YAMLError as e:
        raise ConfigError(
            f"override {_cut(repr(override))}: the value is not YAML "
            f"({_cut(' '.join(str(e).split()))}); quote it"
        ) from None
    *path, last = key.split(".")
    if path[:2] == ["grid", "values"]:
        path, last = path[:2], key.removeprefix("grid.values.")
    for part in path:
        if data.get(part) is None:
            data[part] = {}
        data = data[part]
        if not isinstance(data, dict):
            raise ConfigError(
                f"override {override!r}: {part!r} is not a section; drop what follows it"
            )
    data[last] = value


def read_file(
    path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()
) -> dict[str, Any]:
    """Reads a YAML config, none where path is None, and applies `key=value` overrides. Raises
    ConfigError."""
    data = {} if path is None else _read_keys(path)
    for override in overrides:
        apply_override(data, override)
    return data


def _read_keys(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    try:
        is_file = file.is_file()
    except OSError as e:
        raise ConfigError(f"config {_cut(repr(str(path)))}: {e.strerror}; check the path") from None
    if not is_file:
        folder = file if file.is_dir() else file.parent
        near = sorted(map(str, folder.glob("*.yaml"))) if folder.is_dir() else []
        hint = nearest_name(str(path), near) if near else "; check the path"
        what = "is a folder, not a file" if file.is_dir() else "does not exist"
        raise ConfigError(f"config {str(path)!r} {what}{hint}")
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ConfigError(f"{path}: {file.stat().st_size:,} bytes are no config; is it one?")
        data = _read_yaml(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as e:
        raise ConfigError(f"{path}: not valid YAML: {_cut(' '.join(str(e).split()))}") from None
    except (UnicodeDecodeError, OSError) as e:
        raise ConfigError(f"{path}: cannot be read as text: {e}; is it the config?") from None
    if not isinstance(data, dict):
        what = "is empty" if data is None else f"holds a {type(data).__name__}"
        raise ConfigError(
            f"{path}: the file {what}; it must hold sections, such as those of "
            "configs/quickstart.yaml"
        )
    return data
