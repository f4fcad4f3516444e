"""`store`: own activations as a store, and what a store holds."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from .entry import DebugOption, end_well, help_text
from .verify import run as verify

app = typer.Typer(
    name="store",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make an activation store of your own arrays, look at one, check it, join several.",
)
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Folder or URL of a store.")]


def import_(
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="The store to make.")],
    named: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=PATH...",
            help="layers.3='acts/*.npy'; behind a path, ::KEY names one array of several.",
        ),
    ],
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"], typer.Option(help="Type of the stored rows.")
    ] = "bfloat16",
    documents: Annotated[
        str | None,
        typer.Option(help="Rows a document (such as 256), or a .npy file of each row's number."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the shuffle.")] = 0,
    shard_mib: Annotated[
        float, typer.Option(min=1e-3, max=2**20, help="Size of one file of the store.")
    ] = 128,
    debug: DebugOption = False,
) -> None:
    """Make a store of arrays [rows, width] in .npy, .npz, .safetensors, .pt, .parquet files, or in
    folders that `datasets` saved (SAELens's cached activations). No language model is needed, then
    or later: name the store as `store: OUT.zarr` in a config without model and text.

    A path may be a pattern, whose files follow one another in sorted order (in quotes, as shells
    read a * themselves). Other names are other hookpoints of the same rows. A file of several
    arrays gives the one of the hookpoint's name, or `PATH::KEY`. Objects are never unpickled.

    Rows are cast and shuffled over all files, as those of `cache` are. Rows of token_ids (SAELens's
    column) keep them; others have the id -1. Each row is a document of its own, or each sequence
    where the file has sequences, unless --documents says which rows belong together: what training
    holds out are whole documents.

    Run again after an interruption, it goes on with the shards that are missing.

    flash-sae store import mine.zarr layers.3='acts/3/*.npy' layers.7='acts/7/*.npy'

    flash-sae store import mine.zarr blocks.3.hook_resid_post=saelens-cache --dtype float32
    """

    def work() -> None:
        from ..activations.importing import ImportOptions, run_import

        typer.echo(run_import(out, named, ImportOptions(dtype, seed, shard_mib, documents)))

    end_well(work, debug)


for _name, _run in (("import", import_),):
    app.command(_name, help=help_text(_run.__doc__))(_run)
app.command("verify", help=help_text(verify.__doc__))(verify)


if __name__ == "__main__":
    app()
