"""A whole run's config: the common sections with those of every architecture and engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Self, Union

from pydantic import (
    ModelWrapValidatorHandler,
    PrivateAttr,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from ..config.base import ConfigError, OneOf, section_models
from ..config.file import parse, read_file
from ..config.run import GridConfig, RunConfig
from ..config.sae import SAEConfig
from ..config.train import ENGINE_CHOICE, TrainConfig
from ..models import ARCHITECTURES

# One launch has one mesh and one source of rows, and the hookpoints have a key of their own.
_WIDTHS = ("d_sae", "expansion_factor")
_SHARED_BY_A_GRID = {
    *("train.hookpoint", "train.source", "train.loss"),
    *("train.num_shards", "train.num_replicas"),
}


def _architecture_configs() -> Mapping[str, type[SAEConfig]]:
    return {name: kind.Config for name, kind in ARCHITECTURES.items()}


ARCHITECTURE_CHOICE = OneOf("sae", "architecture", "topk", _architecture_configs)


class Config(RunConfig):
    """A whole run."""

    sae: Annotated[SerializeAsAny[SAEConfig] | None, ARCHITECTURE_CHOICE] = None
    train: Annotated[SerializeAsAny[TrainConfig] | None, ENGINE_CHOICE] = None
    grid: GridConfig | None = None
    _from_grid: tuple[str, ...] = PrivateAttr(default=())
    # Keys of sae that other architectures of the grid have.
    _of_others: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _needed_keys_of_the_grid(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A key that a section needs may stand in grid.values alone; its first value is the
        section's, which only `grid` accepts."""
        data, first, of_others = _first_of_the_grid(data)
        filled, taken = _filled_from_grid(data)
        config = handler(filled)
        config._from_grid, config._of_others = (*first, *taken), of_others
        return config

    @model_validator(mode="after")
    def _one_norm(self) -> Self:
        sae, train = self.sae, self.train
        if sae is None or train is None or sae.input_norm == "none":
            return self
        norm = f"sae.input_norm={sae.input_norm!r}"
        if train.normalize != "none" or train.subtract_mean:
            key = "train.subtract_mean=True"
            if train.normalize != "none":
                key = f"train.normalize={train.normalize!r}"
            raise ValueError(
                f"{key} changes nothing with {norm}, which standardises each row; drop one"
            )
        if train.target is not None:
            raise ValueError(
                f"{norm} is for SAEs: what a transcoder gives is not its input, and could not be "
                "put back; drop it, or train.target"
            )
        return self

    @model_validator(mode="after")
    def _begins_as_sae(self) -> Self:
        if self.train is not None and None not in (self.train.init_from, self.train.target):
            raise ValueError(
                f"train.init_from={self.train.init_from!r} begins SAEs alone, not a transcoder to "
                f"train.target={self.train.target!r}; drop one"
            )
        return self

    def check_complete(self, verb: str) -> None:
        """Raises ConfigError where a needed key has values for `grid` alone."""
        if self._from_grid:
            key = self._from_grid[0]
            raise ConfigError(
                f"key {key!r} is missing: the grid has it for `grid` alone; add it for `{verb}`"
            )

    @field_validator("grid")
    @classmethod
    def _grid_values_fit(cls, grid: GridConfig | None) -> GridConfig | None:
        return grid and grid.typed(_grid_kinds(cls))


def _grid_architectures(values: Any) -> tuple[str, ...]:
    """The known architectures that grid.values lists."""
    names = values.get("sae.architecture") if isinstance(values, dict) else None
    if not isinstance(names, list | tuple):
        return ()
    return tuple(name for name in names if isinstance(name, str) and name in ARCHITECTURES)


def _keys_of(architecture: str) -> set[str]:
    return set(ARCHITECTURES[architecture].Config.model_fields)


def _first_of_the_grid(data: Any) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """Plain data whose section sae is one of an architecture, where a grid has several: its own, or
    the first of the grid's; what was taken from there; the keys that only the others have.
    """
    values = isinstance(data, dict) and isinstance(data.get("grid"), dict) and data["grid"]
    names = _grid_architectures((values or {}).get("values"))
    sae = data.get("sae") if names else None
    if not names or not isinstance(sae, dict | None):
        return data, (), {}
    sae = dict(sae or {})
    first = () if "architecture" in sae else ("sae.architecture",)
    own = sae.setdefault("architecture", names[0])
    if not isinstance(own, str) or own not in ARCHITECTURES:
        return data, (), {}
    others = set().union(*(_keys_of(name) for name in names)) - _keys_of(own)
    of_others = {key: value for key, value in sae.items() if key in others}
    sae = {key: value for key, value in sae.items() if key not in others}
    return {**data, "sae": sae}, first, of_others


def _filled_from_grid(data: Any) -> tuple[Any, tuple[str, ...]]:
    """Plain data with the keys that sections need and only the grid has; which those are."""
    if not isinstance(data, dict) or not isinstance(grid := data.get("grid"), dict):
        return data, ()
    first = _first_values(grid)
    taken = []
    for section, choice in (("sae", ARCHITECTURE_CHOICE), ("train", ENGINE_CHOICE)):
        given = data.get(section) or {}
        try:
            fields = choice.model_of(given).model_fields
        except (AttributeError, ValueError):
            continue  # told when the section is read
        needed = {name for name, field in fields.items() if field.is_required()}
        if not any(given.get(width) for width in _WIDTHS):
            needed |= fields.keys() & set(_WIDTHS)
        for name in sorted(needed - given.keys()):
            if (key := f"{section}.{name}") in first:
                data = {**data, section: {**(data.get(section) or {}), name: first[key]}}
                taken.append(key)
    return data, tuple(taken)


def _first_values(grid: dict[str, Any]) -> dict[str, Any]:
    """The first value of each key of grid.values and of the first of grid.points."""
    values, points = grid.get("values"), grid.get("points")
    found: dict[str, Any] = {}
    if isinstance(points, list | tuple) and points and isinstance(points[0], dict):
        found |= points[0]
    for key, choices in values.items() if isinstance(values, dict) else ():
        if isinstance(choices, list | tuple) and choices:
            found[key] = choices[0]
    return found


def _grid_kinds(config: type[Config]) -> dict[str, Any]:
    """The annotation of each key that grid.values may hold, over all architectures and engines."""
    kinds: dict[str, Any] = {}
    for section in ("sae", "train"):
        for model in section_models(config, section):
            for name, field in model.model_fields.items():
                key = f"{section}.{name}"
                # Two architectures may give one key two types.
                kinds[key] = Union[kinds.get(key, field.annotation), field.annotation]  # noqa: UP007
    return {key: kind for key, kind in kinds.items() if key not in _SHARED_BY_A_GRID}


def parse_config(data: dict[str, Any], source: str = "config") -> Config:
    """Builds a Config from plain data. Raises ConfigError telling the first mistake."""
    return parse(Config, data, source)


def load_config(path: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Reads a YAML config, none where path is None, and applies `key=value` overrides. Raises
    ConfigError."""
    source = "the command line" if path is None else str(path)
    return parse_config(read_file(path, overrides), source)


def plain_data(config: Config) -> dict[str, Any]:
    """The plain data that `parse_config` makes a config of anew."""
    data = config.model_dump(mode="json", exclude_unset=True)
    for section, choice in (("sae", ARCHITECTURE_CHOICE), ("train", ENGINE_CHOICE)):
        if (model := getattr(config, section)) is not None:
            # A section that came as a model may have left it to its default.
            data[section][choice.tag] = getattr(model, choice.tag)
    if config._of_others:
        data["sae"] = config._of_others | data["sae"]
    for key in config._from_grid:
        section, _, name = key.partition(".")
        data[section].pop(name, None)
    return data


def with_values(config: Config, values: dict[str, Any]) -> Config:
    """A copy of a config with dotted keys replaced, checked anew. With another architecture the
    keys go that this has not. Raises ConfigError.
    """
    data = config.model_dump(mode="json", exclude_unset=True)
    other = values.get("sae.architecture")
    if other in ARCHITECTURES:
        of_all = config._of_others | (data.get("sae") or {})
        data["sae"] = {key: of_all[key] for key in of_all if key in _keys_of(other)}
    for key, value in values.items():
        section, _, name = key.partition(".")
        data[section] = {**(data.get(section) or {}), name: value}
    return parse_config(data, "grid")


def own_choices(choices: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Combinations of values, each once. Those that name an architecture have its own keys alone of
    the section sae.
    """
    found: list[dict[str, Any]] = []
    for values in choices:
        if (name := values.get("sae.architecture")) in ARCHITECTURES:
            own = {f"sae.{key}" for key in _keys_of(name)}
            values = {k: v for k, v in values.items() if not k.startswith("sae.") or k in own}
        if values not in found:
            found.append(values)
    return found
