"""`plan`: what a config takes, before anything is launched."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from .entry import ConfigArgument, DebugOption, OverridesArgument, end_well, help_text

_HELP = """Predict what a config takes before it is launched: memory, time, bytes, disk.

Of `cache`, and of `grid` where the file has that section, else of `train` (grid=null leaves it
out): memory of a rank by what holds it, bytes that a step sends, host memory and disk, hours; with
train.num_shards=auto the shards x replicas that are fastest; for a grid which group trains what.
No GPU is needed, nothing is allocated, no weights are downloaded. Ends with 2 and a sentence that
names what to change where a launch would be refused.

flash-sae plan configs/gemma-2-2b-grid.yaml --gpu H100 --processes 8

flash-sae plan configs/llama-3.1-8b-wide.yaml --processes 64 --hosts 8 train.num_shards=auto
"""


def run(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None, typer.Option(help="H200, H100, B200, A100, L40S or cpu; else what is here.")
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the launch, over all hosts; else one a GPU here, or the config's."
        ),
    ] = None,
    hosts: Annotated[int, typer.Option(min=1, help="Of the launch.")] = 1,
    width: Annotated[
        int | None,
        typer.Option(min=1, help="Of the hookpoints, where neither store nor model is at hand."),
    ] = None,
    store_gb_s: Annotated[
        float | None, typer.Option(min=0.001, help="GB/s that a host reads from the store.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    debug: DebugOption = False,
) -> None:
    """See _HELP."""
    launch = (gpu, processes, hosts, store_gb_s)
    end_well(lambda: _show(config, overrides or [], launch, width, as_json), debug)


def _show(
    config: str,
    overrides: list[str],
    launch: tuple[str | None, int | None, int, float | None],
    width: int | None,
    as_json: bool,
) -> None:
    """Prints the plan. Raises ConfigError where a launch would be refused."""
    # Not at the top: `--help` need not wait for torch.
    from ..config.base import ConfigError
    from ..planner import report
    from ..planner.devices import launch_for
    from ..planner.overview import overview, processes_of
    from ..training.job import load_config

    whole = load_config(config, overrides)
    found = overview(whole, launch_for(*launch, processes_of(whole)), width)
    page = report.text(found, whole, config)
    typer.echo(json.dumps(report.data(found), indent=1) if as_json else page)
    if found.refused:
        raise ConfigError(found.refused[0])


run.__doc__ = help_text(_HELP)


if __name__ == "__main__":
    typer.run(run)
