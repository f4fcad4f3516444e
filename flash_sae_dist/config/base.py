"""What every section of a config is made of: strict, frozen models, types, errors, names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from os.path import expanduser
from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Text = Annotated[str, Field(min_length=1)]
# A URL has no `~` in front and stays what it is.
Folder = Annotated[Text, AfterValidator(expanduser)]
# What numpy, torch and the kernels all take, with steps added to it.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Hookpoint = Annotated[str, AfterValidator(lambda name: check_hookpoint(name))]
# One, or several joined by +, whose rows a crosscoder reads side by side.
Hookpoints = Annotated[str, AfterValidator(lambda name: check_hookpoints(name))]
# Rows of the dictionary are numbered in 32 bits.
Latents = Annotated[int, Field(gt=0, lt=2**31)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class UserError(ValueError):
    """Something that the user can set right, told in one sentence; a verb ends with it, not with a
    traceback.
    """


class ConfigError(UserError):
    """A mistake in a config or on the command line, found before any work: the key, the value, the
    fix.
    """


def check_hookpoint(name: str) -> str:
    """A hookpoint's name, which is a folder's name too. Raises ValueError where it is none that a
    module can have, such as `../x` or `/x`.
    """
    stem, colon, side = name.partition(":")
    parts = stem.split(".")
    wrong = not all(parts) or any(c in _NO_NAME or not c.isprintable() for c in stem)
    if wrong or (colon and side not in ("input", "output")):
        raise ValueError(
            f"hookpoint {name!r} is no module's name; it has parts between dots, no slash, and "
            "may end in :input"
        )
    return name


def sources_of(hookpoint: str) -> list[str]:
    """The hookpoints that a name joins by +: one, of a crosscoder several."""
    return hookpoint.split("+")


def check_hookpoints(name: str) -> str:
    """Raises ValueError where a name is neither a hookpoint's nor several joined by +."""
    names = sources_of(name)
    for one in names:
        check_hookpoint(one)
        if names.count(one) > 1:
            raise ValueError(f"hookpoint {name!r} has {one!r} twice; drop one")
    return name


_NO_NAME = frozenset("/\\")


class StrictModel(BaseModel):
    """A section: unknown keys and wrong types are refused, values never change after birth."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _yaml_types(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, str) and "\0" in value:
            raise PydanticCustomError("nul", "text cannot hold a NUL character")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise PydanticCustomError("too_large", "a whole number has to fit 64 bits")
        return from_yaml(value, cls.model_fields[str(info.field_name)].annotation)


@dataclass(frozen=True)
class OneOf:
    """Annotates a section that has several models; one of its keys (the tag) names the model.

    The models are looked up at each validation, so that one registered later is known at once.
    """

    section: str
    tag: str
    default: str
    models: Callable[[], Mapping[str, type[StrictModel]]]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self._validate, handler(source))

    def _validate(self, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return self.model_of(value).model_validate(value)

    def model_of(self, values: Mapping[str, Any]) -> type[StrictModel]:
        """The model that a section's values ask for. Raises ValueError for an unknown tag."""
        tag, models = values.get(self.tag, self.default), self.models()
        if not isinstance(tag, str) or tag not in models:
            raise ValueError(
                f"{self.section}.{self.tag}={shown(tag)} is not a choice"
                f"{nearest_name(str(tag), list(models))}"
            )
        return models[tag]

    def tags_with(self, key: str) -> list[str]:
        """The tags whose model has a key."""
        return [tag for tag, model in self.models().items() if key in model.model_fields]


def one_of(model: type[BaseModel], name: str) -> OneOf | None:
    """How a field's model is chosen; None for a field of one type."""
    return next((m for m in model.model_fields[name].metadata if isinstance(m, OneOf)), None)


def shown(value: Any) -> str:
    """A value as YAML has it: lists are lists; the beginning of a long one."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 300 else f"{text[:300]} ..."


def section_models(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The models that a field may hold, each once; none for a plain value or a list."""
    if (choice := one_of(model, name)) is not None:
        return list(dict.fromkeys(choice.models().values()))
    annotation = model.model_fields[name].annotation
    return _models_in((annotation, *get_args(annotation)))


def element_models(model: type[BaseModel], name: str) -> list[type[BaseModel]]:
    """The model of a field's elements, where it holds a list of sections."""
    lists = get_args(model.model_fields[name].annotation)
    return [m for kind in lists if get_origin(kind) is tuple for m in _models_in(get_args(kind))]


def _models_in(options: tuple[Any, ...]) -> list[type[BaseModel]]:
    return [a for a in options if isinstance(a, type) and issubclass(a, BaseModel)][:1]


def from_yaml(value: Any, kind: Any) -> Any:
    """YAML has lists and reads 1e-4 as a string; strict fields are tuples and floats."""
    # A section's lists are tuples by the time that the section itself is looked at.
    if isinstance(value, list | tuple):
        return tuple(from_yaml(v, kind) for v in value)
    if isinstance(value, dict):
        return {name: from_yaml(v, kind) for name, v in value.items()}
    if isinstance(value, str) and _holds_float(kind) and _is_exponent_number(value):
        return float(value)
    return value


def _holds_float(kind: Any) -> bool:
    return kind is float or any(_holds_float(part) for part in get_args(kind))


def _is_exponent_number(text: str) -> bool:
    mantissa, e, exponent = text.lower().partition("e")
    return bool(e) and mantissa.replace(".", "", 1).isdigit() and exponent.lstrip("+-").isdigit()


def match_names(pattern: str, names: list[str]) -> list[str]:
    """The module names that a pattern means, in their order.

    `*` is (part of) one part of a dotted name, so `layers.*` are the blocks and not all that is
    inside them; `**` is any number of parts; `?` and `[...]` are as in a shell.
    """
    parts = pattern.split(".")
    # Any number of any number is any number.
    parts = [part for at, part in enumerate(parts) if part != "**" or parts[at - 1 : at] != ["**"]]
    return [name for name in names if _matches(parts, name.split("."))]


def _matches(pattern: list[str], name: list[str]) -> bool:
    """Reads the pattern once, with the numbers of the name's parts that it may have used up."""
    used = {0}
    for part in pattern:
        if part == "**":
            used = set(range(min(used), len(name) + 1))
        else:
            used = {n + 1 for n in used if n < len(name) and fnmatchcase(name[n], part)}
        if not used:
            return False
    return len(name) in used


def nearest_name(word: str, known: list[str]) -> str:
    """The end of an error sentence: the nearest known name, or all of them when none is near."""
    # difflib takes the square of the length.
    close = difflib.get_close_matches(word[:200], known[:2000], n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(sorted(known))}"
