"""`flash-sae VERB CONFIG.yaml [key=value ...]`."""

from __future__ import annotations

import importlib
from typing import Annotated, get_args

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from ..config import Config
from .entry import command

BENCHES = {
    "encode": "bench",
    "decode": "bench_step",
    "step": "bench_step",
    "parity": "bench_parity",
}
VERBS = ("cache", "train", "grid", "evaluate", "export")

app = typer.Typer(
    name="flash-sae",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train sparse autoencoders at scale: cache activations once, train many SAEs from them, "
    "measure them, hand them to other libraries. For several processes put "
    "`accelerate launch -m flash_sae_dist.launch.VERB` in place of `flash-sae VERB`.",
)


def _fields(model: type[BaseModel], prefix: str) -> list[tuple[str, str, str]]:
    rows = []
    for name, field in model.model_fields.items():
        key = f"{prefix}{name}"
        options = (field.annotation, *get_args(field.annotation))
        section = next(
            (a for a in options if isinstance(a, type) and issubclass(a, BaseModel)), None
        )
        if section is not None:
            rows.append((f"[bold]{key}[/bold]", "", (section.__doc__ or "").splitlines()[0]))
            rows += _fields(section, f"{key}.")
        else:
            default = "needed" if field.is_required() else str(field.default)
            rows.append((key, default, field.description or ""))
    return rows


def keys(
    contains: Annotated[str, typer.Argument(help="Show only keys that contain this word.")] = "",
) -> None:
    """List every key of a config with its default and meaning."""
    table = Table("key", "default", "meaning")
    for key, default, meaning in _fields(Config, ""):
        if contains in key:
            table.add_row(key, default, meaning)
    Console().print(table)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def bench(
    context: typer.Context,
    what: Annotated[str, typer.Argument(help="encode, decode, step or parity")] = "",
) -> None:
    """Time kernels beside their peers on this machine's GPU: `flash-sae bench encode --help`."""
    if what in ("", "--help"):
        typer.echo(context.get_help())
        typer.echo(f"WHAT is one of {', '.join(BENCHES)}; each has a --help of its own.")
        raise typer.Exit(0 if what else 2)
    if what not in BENCHES:
        typer.echo(f"error: bench {what!r} is none of {', '.join(BENCHES)}", err=True)
        raise typer.Exit(2)
    if "--help" not in context.args and not _has_gpu():
        typer.echo("error: a bench times a GPU, and torch finds none on this machine", err=True)
        raise typer.Exit(2)
    module = importlib.import_module(f"{__package__}.{BENCHES[what]}")
    module.app([what, *context.args], prog_name="flash-sae bench")


def build() -> typer.Typer:
    """The application with every verb; each verb's own imports wait until it runs."""
    for name in VERBS:
        app.command(name)(command(importlib.import_module(f"{__package__}.{name}").run))
    app.command()(keys)
    extra = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=extra, add_help_option=False)(bench)
    return app


def main() -> None:
    """Entry point of the console script."""
    build()()


if __name__ == "__main__":
    main()
