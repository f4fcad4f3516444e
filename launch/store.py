"""`store`: own activations as a store, and what a store holds."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .entry import DebugOption, end_well, help_text
from .verify import run as verify

if TYPE_CHECKING:
    from ..activations.summary import Distribution

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
        Literal["bfloat16", "float16", "float32", "int8"],
        typer.Option(help="Type of the stored rows."),
    ] = "bfloat16",
    documents: Annotated[
        str | None,
        typer.Option(help="Rows a document (such as 256), or a .npy file of each row's number."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the shuffle.")] = 0,
    shard_mib: Annotated[
        float, typer.Option(min=1e-3, max=2**20, help="Size of one file of the store.")
    ] = 128,
    max_norm_ratio: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RATIO|NAME=RATIO",
            help="Leave out rows whose norm exceeds so many times the median, such as 10: of all "
            "hookpoints, or NAME=RATIO of one; may be given several times.",
        ),
    ] = None,
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

        ratios = tuple(max_norm_ratio or ())
        options = ImportOptions(dtype, seed, shard_mib, documents, ratios)
        typer.echo(run_import(out, named, options))

    end_well(work, debug)


def info(
    store: StoreArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    debug: DebugOption = False,
) -> None:
    """Tell what a store holds: rows, hookpoints, sizes, how it was made, and the statistics that
    stand in it.

    rms is the root mean square of the elements, norm that of the rows' norms, mean norm the norm of
    the mean activation.

    flash-sae store info runs/quickstart/activations.zarr
    """

    def work() -> None:
        from ..activations.store import ActivationStore
        from ..activations.summary import describe

        told = describe(ActivationStore.open(store))
        if as_json:
            typer.echo(json.dumps(told, indent=1))
            return
        hookpoints = told.pop("hookpoints")
        for key, value in told.items():
            typer.echo(f"{key:14} {_line(value)}")
        table = _table("hookpoint", "width", "bytes", "rms", "norm", "mean norm")
        for name, found in hookpoints.items():
            numbers = (found[key] for key in ("rms", "norm", "mean_norm"))
            cells = ("-" if n is None else f"{n:.4g}" for n in numbers)
            table.add_row(Text(name), str(found["width"]), f"{found['bytes']:,}", *cells)
        _print(table)

    end_well(work, debug)


def stats(
    store: StoreArgument,
    hookpoints: Annotated[
        list[str] | None, typer.Argument(metavar="HOOKPOINT...", help="Left out, all.")
    ] = None,
    rows: Annotated[
        int, typer.Option(min=0, help="Rows to read, in chunks from everywhere; 0: all.")
    ] = 65_536,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
    debug: DebugOption = False,
) -> None:
    """Read rows of a store and tell how they are distributed: quantiles of their norms, the share
    of massive rows (norm above 10 medians), and the dimensions with the heaviest tails.

    kurtosis is 3 for a normal distribution; beside it stands the dimension's share of the mean
    square. A few dimensions with most of it dominate an SAE's loss.

    flash-sae store stats runs/quickstart/activations.zarr model.layers.8
    """

    def work() -> None:
        from ..activations.store import ActivationStore
        from ..activations.summary import distribution
        from ..progress import progress_bar

        opened = ActivationStore.open(store)
        found = {}
        names = hookpoints or opened.hookpoints
        with progress_bar("stats", len(names), "hookpoints", len(names) > 1) as bar:
            for name in names:
                opened.width(name)
                found[name] = distribution(opened, name, rows or opened.rows)
                bar.advance(1)
        if as_json:
            typer.echo(json.dumps({name: d._asdict() for name, d in found.items()}, indent=1))
        else:
            _print_stats(found)

    end_well(work, debug)


def merge(
    out: Annotated[str, typer.Argument(metavar="OUT.zarr", help="The store to make.")],
    stores: Annotated[list[str], typer.Argument(metavar="STORE...", help="The stores to merge.")],
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy files in place of linking them.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Merge stores into a new one: of other hookpoints of the same rows, side by side, or of the
    same hookpoints with other rows, behind one another.

    Files that serve as they are become hard links, which take no space and outlive the old stores;
    --copy makes files of their own. The others are written anew: the rows from the first one on
    that no longer begins at a shard's border, the numbers of documents, which go on from those of
    the store before, and the token table of what `cache` made. Files that are linked or copied are
    not read: `flash-sae verify OUT.zarr` compares them with their checksums.

    flash-sae store merge both.zarr layer3.zarr layer7.zarr

    flash-sae store merge long.zarr monday.zarr tuesday.zarr
    """

    def work() -> None:
        from ..activations.merging import run_merge

        typer.echo(run_merge(out, stores, copy=copy))

    end_well(work, debug)


def _line(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}={_line(v)}" for k, v in value.items())
    if isinstance(value, list):
        shown = [str(v) for v in value[:4]]
        return ", ".join([*shown, f"... ({len(value)})"] if len(value) > 4 else shown)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="underline")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(table: Table) -> None:
    Console(width=max(120, Console().width)).print(table)


def _print_stats(found: dict[str, Distribution]) -> None:
    some = next(iter(found.values()))
    quantiles = [f"norm {q:.1%}" for q in some.norms]
    table = _table("hookpoint", "rows", "rms", "mean norm", *quantiles, "max", "massive")
    dims = _table("hookpoint", "constant", "median kurtosis", "heaviest: kurtosis, share")
    for name, d in found.items():
        numbers = (d.rms, d.mean_norm, *d.norms.values(), d.max_norm)
        cells = (f"{n:.4g}" for n in numbers)
        table.add_row(Text(name), f"{d.rows:,}", *cells, f"{d.massive:.3%}")
        top = "; ".join(f"{dim}: {k:.3g}, {share:.1%}" for dim, k, share in d.top_dims)
        dims.add_row(Text(name), str(d.constant_dims), f"{d.median_kurtosis:.3g}", top)
    _print(table)
    _print(dims)


for _name, _run in (("import", import_), ("info", info), ("stats", stats), ("merge", merge)):
    app.command(_name, help=help_text(_run.__doc__))(_run)
app.command("verify", help=help_text(f"The same as `flash-sae verify`. {verify.__doc__}"))(verify)


if __name__ == "__main__":
    app()
