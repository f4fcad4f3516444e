"""`verify`: every byte of what the project wrote, compared with its checksums."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from ..config.base import ConfigError, UserError


def run(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="A store, an output folder, a job, an SAE, an export."),
    ],
) -> None:
    """Read every byte below a folder that this project wrote, and compare it with its checksums.

    Finds stores, jobs, SAEs, checkpoints, exports and reports, however deep. Prints a line for each
    and for each damaged file what to do; ends with 1 where something is damaged.

    flash-sae verify runs/quickstart
    """
    from ..progress import progress_bar
    from ..verify import check, found_in, size_of

    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    try:
        things = found_in(path)
    except UserError as e:
        typer.echo(f"error: {e}", err=True)
        raise typer.Exit(2 if isinstance(e, ConfigError) else 1) from e
    sizes = [size_of(thing) for thing in things]
    damaged = 0
    lines: list[str] = []
    with progress_bar("verify", sum(sizes), "bytes", sum(sizes) > _SHOWN_FROM) as bar:
        for thing, size in zip(things, sizes, strict=True):
            before = bar.done
            problems = check(thing, bar.advance)
            bar.advance(max(0, size - (bar.done - before)))
            damaged += bool(problems)
            state = "DAMAGED" if problems else "whole  "
            lines.append(f"{state}  {thing.kind:10}  {thing.path}  ({size:,} bytes)")
            lines += [f"  {problem}" for problem in problems]
    for line in lines:
        typer.echo(line)
    typer.echo(
        f"{len(things)} checked, {len(things) - damaged} whole, {damaged} damaged; "
        f"{sum(sizes):,} bytes"
    )
    if damaged:
        raise typer.Exit(1)


# Less than this takes no time to speak of.
_SHOWN_FROM = 1 << 28


if __name__ == "__main__":
    typer.run(run)
