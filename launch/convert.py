"""`convert`: an SAE's files of one library in the form of another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ..config.base import ConfigError
from .entry import DebugOption, end_well, help_text

if TYPE_CHECKING:
    from ..interop import Contents


From = Annotated[
    str,
    typer.Argument(
        metavar="FROM",
        help="File or folder of an SAE in any known format, or owner/name on the hub.",
    ),
]
To = Annotated[str, typer.Argument(metavar="TO", help="Where to write.")]
FormatOption = Annotated[str, typer.Option(help="Format to write; docs/formats.md lists them.")]
Subfolder = Annotated[str, typer.Option(help="Folder or file inside a hub repository.")]
K = Annotated[
    int | None, typer.Option(min=1, help="k, where the files do not tell it (Qwen-Scope).")
]
Hookpoint = Annotated[
    str | None, typer.Option(help="Module of the model, where the files do not tell it.")
]
Output = Annotated[str | None, typer.Option(help="Of a transcoder the module that it gives.")]
Model = Annotated[str | None, typer.Option(help="Name of the model, likewise.")]
Rows = Annotated[
    str | None,
    typer.Option(help="Store to measure thresholds on (circuit_tracer, of TopK SAEs)."),
]


def run(
    source: From,
    target: To,
    format: FormatOption,
    subfolder: Subfolder = "",
    k: K = None,
    hookpoint: Hookpoint = None,
    output_hookpoint: Output = None,
    model: Model = None,
    rows: Rows = None,
    debug: DebugOption = False,
) -> None:
    """Convert an SAE from one library's files to another's: the format of FROM is found.

    Reads and writes the forms of SAELens, sparsify, dictionary_learning, llamascopium, Gemma Scope,
    circuit-tracer, OpenAI and Qwen-Scope, and this library's own (flash_sae_dist).

    flash-sae convert trainer_0 out --format sae_lens

    flash-sae convert layer12.sae.pt out --format flash_sae_dist --k 50

    flash-sae convert EleutherAI/sae-llama-3-8b-32x out --subfolder layers.10 --format sae_lens
    """

    def work() -> None:
        from .. import interop
        from ..interop.hub import local_copy

        if format not in interop.FORMATS:
            raise ConfigError(f"--format {format}: it is none of {', '.join(interop.FORMATS)}")
        try:
            contents = interop.read(local_copy(source, subfolder), k=k)
            about = contents.about
            about = about._replace(
                hookpoint=hookpoint or about.hookpoint,
                model_name=model or about.model_name,
                output_hookpoint=output_hookpoint or about.output_hookpoint,
            )
            contents = contents._replace(about=about)
            if rows is not None:
                contents = _with_thresholds(contents, source, rows)
            path = interop.save(contents, target, format)
        except ValueError as e:
            raise ConfigError(str(e)) from e
        d_sae, d_in = contents.weights["W_enc"].shape
        typer.echo(f"{contents.architecture}, {d_sae:,} latents of width {d_in:,} -> {path}")

    end_well(work, debug)


def _with_thresholds(contents: Contents, source: str, rows: str) -> Contents:
    from pathlib import Path

    from ..activations.store import ActivationStore
    from ..interop import build, thresholds

    if contents.about.hookpoint is None:
        raise ConfigError(f"{source} tells no hookpoint to read of {rows}; give --hookpoint")
    store, sae = ActivationStore.open(rows), build(Path(source), contents)
    x = thresholds.rows_of(store, contents.about.hookpoint).to(sae.W_dec.dtype)
    return thresholds.with_thresholds(sae, x)


run.__doc__ = help_text(run.__doc__)

if __name__ == "__main__":
    typer.run(run)
