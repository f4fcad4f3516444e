"""`push`: finished SAEs onto the Hugging Face hub."""

from __future__ import annotations

from typing import Annotated

import typer

from .entry import DebugOption, end_well, help_text

From = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="Folder of a run, as its config's key output.")
]
Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")]
Saes = Annotated[
    list[str] | None,
    typer.Option("--sae", help="SAE by its folder under OUTPUT, * is any text; all, left out."),
]
License = Annotated[
    str | None, typer.Option(help="License of the weights by the hub's name, such as apache-2.0.")
]
Private = Annotated[bool, typer.Option("--private", help="Make a new repository private.")]
Revision = Annotated[str | None, typer.Option(help="Branch to push to.")]


def run(
    output: From,
    repo: Repo,
    sae: Saes = None,
    license: License = None,
    private: Private = False,
    revision: Revision = None,
    debug: DebugOption = False,
) -> None:
    """Upload finished SAEs as safetensors, with a model card made from their run, in one commit.

    One SAE goes to the repository's root, several to folders of their names. Files and card of an
    earlier push are replaced where they have the same path; other files stay. Log in before with
    `hf auth login`. Run `flash-sae evaluate` first: its figures are in the card.

    flash-sae push runs/quickstart me/smollm2-saes --license apache-2.0

    flash-sae push runs/quickstart me/smollm2-k32 --sae "model.layers.8/k=32"
    """

    def work() -> None:
        from ..hub.push import push

        pushed = push(
            output,
            repo,
            saes=tuple(sae or ["*"]),
            license=license,
            private=private,
            revision=revision,
        )
        for name, place in pushed.places.items():
            typer.echo(f"{name} -> {repo}/{place}".rstrip("/"))
        typer.echo(pushed.url)

    end_well(work, debug)


run.__doc__ = help_text(run.__doc__)

if __name__ == "__main__":
    typer.run(run)
