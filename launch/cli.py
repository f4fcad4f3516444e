"""`flash-sae VERB CONFIG.yaml [key=value ...]`."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .. import __version__
from ..config.base import OneOf, nearest_name, one_of, section_models
from . import store
from .entry import command

BENCHES = {
    "encode": "bench",
    "decode": "bench_step",
    "step": "bench_step",
    "parity": "bench_parity",
    "shards": "bench_shards",
    "cache": "bench_cache",
    "features": "bench_features",
    "load": "bench_load",
    "train": "bench_train",
    "stream": "bench_stream",
    "density": "bench_density",
    "quality": "bench_quality",
}
VERBS = (
    *("plan", "cache", "train", "grid", "evaluate", "features", "export", "convert"),
    *("push", "pull", "verify"),
)
# Those that take folders or repositories in place of a config.
PATH_VERBS = ("convert", "push", "pull", "verify")
# Those with options of their own.
OWN_COMMANDS = ("plan", *PATH_VERBS)

app = typer.Typer(
    name="flash-sae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train sparse autoencoders at scale: cache activations once, train many SAEs from them, "
    "measure them, hand them to other libraries. For several processes put "
    "`accelerate launch -m flash_sae_dist.launch.VERB` in place of `flash-sae VERB`.",
)


def _show_version(shown: bool) -> None:
    if shown:
        typer.echo(f"flash_sae_dist {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    del version


class _Key(NamedTuple):
    """A key of a config, or a section of keys."""

    name: str
    default: str  # as YAML has it
    meaning: str
    section: bool = False


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[_Key]:
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        choice, sections = one_of(model, name), section_models(model, name)
        if sections:
            yield _Key(key, "", (sections[0].__doc__ or "").splitlines()[0], section=True)
        if choice is not None:
            yield from _keys_of_all(choice)
        elif sections:
            yield from _keys(sections[0], f"{key}.")
        else:
            value = field.get_default(call_default_factory=True)
            if field.is_required():
                default = "needed"
            else:
                default = value if isinstance(value, str) else json.dumps(value)
            yield _Key(key, default, " ".join((field.description or "").split()))


def _keys_of_all(choice: OneOf) -> Iterator[_Key]:
    """The keys of every model of a section, each once; those that not all have say who has them,
    and those that mean something else to each say what.
    """
    found: dict[str, dict[_Key, list[str]]] = {}  # by name, who has the key with one meaning
    for tag, model in choice.models().items():
        for key in _keys(model, f"{choice.section}."):
            found.setdefault(key.name, {}).setdefault(key, []).append(tag)
    for name, kinds in found.items():
        key, owners = next(iter(kinds)), [tag for tags in kinds.values() for tag in tags]
        if name == f"{choice.section}.{choice.tag}":
            # What each tag stands for, where its model says so.
            own = [k.meaning for k, tags in kinds.items() if k.meaning.startswith(f"{tags[0]}:")]
            yield key._replace(meaning=" ".join(own or [key.meaning]))
            continue
        if len(kinds) > 1:
            told = [(", ".join(tags), k) for k, tags in kinds.items()]
            key = key._replace(
                default="; ".join(f"{tags} {k.default}" for tags, k in told)
                if len({k.default for k in kinds}) > 1
                else key.default,
                meaning=" ".join(f"({choice.tag} {tags}) {k.meaning}" for tags, k in told),
            )
        elif len(owners) < len(choice.models()):
            key = key._replace(meaning=f"({choice.tag} {', '.join(owners)}) {key.meaning}")
        yield key


def keys(
    contains: Annotated[str, typer.Argument(help="Show only keys that contain this word.")] = "",
) -> None:
    """List every key of a config with its default and meaning."""
    from ..training.job import Config

    known = list(_keys(Config))
    shown = [key for key in known if contains in key.name]
    if not shown:
        near = nearest_name(contains, [key.name for key in known])
        # All of them are no hint.
        near = near if near.startswith("; did") else "; `flash-sae keys` lists all"
        typer.echo(f"error: no key contains {contains!r}{near}", err=True)
        raise typer.Exit(2)
    table = Table(box=None, pad_edge=False, header_style="underline")
    # Keys are there to be copied: they are never cut or broken.
    table.add_column("key", no_wrap=True, min_width=max(len(key.name) for key in shown))
    table.add_column("default", overflow="fold")
    table.add_column("meaning", overflow="fold")
    for key in shown:
        style = "bold" if key.section else None
        table.add_row(*(Text(text) for text in key[:3]), style=style)
    Console(width=_width()).print(table)


def _width() -> int | None:
    """The terminal's own; in a pipe so wide that each key has one line."""
    return None if sys.stdout.isatty() else 1000


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def bench(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            help="encode, decode, step, density, parity, shards, cache, load, train, stream or "
            "quality"
        ),
    ] = "",
) -> None:
    """Time kernels beside their peers on this machine's GPU, and jobs (cache, load, train, stream)
    beside their limits: `flash-sae bench encode --help`. quality, which needs no GPU, trains SAEs
    beside other libraries' at equal tokens."""
    if what in ("", "--help"):
        typer.echo(context.get_help())
        typer.echo(f"WHAT is one of {', '.join(BENCHES)}; each has a --help of its own.")
        raise typer.Exit(0 if what else 2)
    if what not in BENCHES:
        typer.echo(f"error: bench {what!r} is none of {', '.join(BENCHES)}", err=True)
        raise typer.Exit(2)
    if what != "quality" and not {"--help", "--cpu"} & set(context.args) and not _has_gpu():
        typer.echo("error: a bench times a GPU, and torch finds none on this machine", err=True)
        raise typer.Exit(2)
    module = importlib.import_module(f"{__package__}.{BENCHES[what]}")
    module.app([what, *context.args], prog_name="flash-sae bench")


def build() -> typer.Typer:
    """The application with every verb; each verb's own imports wait until it runs."""
    for name in VERBS:
        run = importlib.import_module(f"{__package__}.{name}").run
        app.command(name)(run if name in OWN_COMMANDS else command(run))
    app.add_typer(store.app)
    app.command()(keys)
    extra = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=extra, add_help_option=False)(bench)
    return app


def main() -> None:
    """Entry point of the console script."""
    build()()


if __name__ == "__main__":
    main()
