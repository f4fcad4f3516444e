"""What every verb shares: its command line, its processes, and errors told in one sentence."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from ..config import Config, ConfigError, nearest_name
from ..config_file import load_config

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG.yaml", help="YAML file; `flash-sae keys` lists its keys.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]...",
        help="Replace values: train.batch_tokens=8192 sae.k=64",
    ),
]
Run = Callable[[Config], None]


def command(run: Run) -> Callable[[str, list[str] | None], None]:
    """A verb's typer command: a mistake ends it in one sentence and exit code 2."""

    def verb(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
        logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        try:
            run(load_config(config, overrides or []))
        except ConfigError as e:
            if os.environ.get("RANK", "0") == "0":
                typer.echo(f"error: {e}", err=True)
            sys.exit(2)

    verb.__doc__ = run.__doc__
    return verb


def verb_main(run: Run) -> None:
    """Entry point of `accelerate launch -m flash_sae_dist.launch.VERB CONFIG.yaml ...`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(run))
    app()


def _check_trackers(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know or that is not installed."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(f"trackers: {name!r} is no tracker{nearest_name(name, known)}")
        if name not in installed:
            raise ConfigError(
                f"trackers: {name!r} is not installed; pip install {name}, or drop it from the list"
            )


@contextmanager
def processes(config: Config, *, trackers: bool = False) -> Iterator[Any]:
    """The accelerator of this launch, torn down whatever happens inside.

    Alone, under `accelerate launch` or under torchrun; CPU with gloo where there is no CUDA device.
    """
    import torch
    from accelerate import Accelerator

    if trackers:
        _check_trackers(config.trackers)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(),
        log_with=(list(config.trackers) or None) if trackers else None,
        project_dir=config.output,
    )
    try:
        if trackers and config.trackers:
            accelerator.init_trackers("flash_sae_dist")
        yield accelerator
    finally:
        # Left up, a gloo group aborts some processes after their work is done.
        accelerator.end_training()
