"""`pull`: SAEs of the Hugging Face hub into a folder."""

from __future__ import annotations

from typing import Annotated

import typer

from .entry import DebugOption, end_well, help_text

Repo = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Repository of the hub.")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="New folder to write.")]
Subfolder = Annotated[str, typer.Option(help="Only this folder of the repository.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit.")]


def run(
    repo: Repo,
    folder: Folder,
    subfolder: Subfolder = "",
    revision: Revision = None,
    debug: DebugOption = False,
) -> None:
    """Download the SAEs of a repository: safetensors, their configs and the model card, no pickles.

    Prints the folder and the format of each SAE, which evaluate (SAE=PATH), train (train.init_from)
    and convert take. What `push` uploaded is compared with its checksums.

    flash-sae pull me/smollm2-saes saes

    flash-sae pull EleutherAI/sae-pythia-70m-32k saes --subfolder layers.3
    """

    def work() -> None:
        from ..hub.pull import pull

        for found in pull(repo, folder, subfolder=subfolder, revision=revision):
            typer.echo(f"{found.path} ({found.format})")

    end_well(work, debug)


run.__doc__ = help_text(run.__doc__)

if __name__ == "__main__":
    typer.run(run)
