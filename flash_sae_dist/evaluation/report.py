"""Evaluations as files and pictures: evaluation.json an SAE, one for all, a table, plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from ..files import write_checksums, write_json, write_text
from .loss_recovered import LossRecovered
from .metrics import ReconstructionMetrics, density_histogram
from .plots import plot_density, plot_frontiers


def evaluation_record(
    job: str,
    hookpoint: str,
    k: int | None,
    d_sae: int,
    m: ReconstructionMetrics,
    loss: LossRecovered | None,
) -> dict[str, Any]:
    """All that was measured of one SAE, as plain data; None for what is no finite number, which
    JSON has no word for.
    """
    record: dict[str, Any] = {"job": job, "hookpoint": hookpoint, "k": k, "d_sae": d_sae}
    # Training's dead_fraction is another: it counts over train.dead_after_tokens.
    record |= _finite(
        {
            "tokens": m.tokens,
            "fvu": m.fvu,
            "cosine": m.cosine,
            "l0": m.l0,
            "never_fired_fraction": m.dead_fraction,
        }
    )
    record["density_histogram"] = density_histogram(m.density)._asdict()
    if loss is not None:
        record["loss"] = _finite({**loss._asdict(), "recovered": loss.recovered})
    return record


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_evaluation(folder: Path, record: dict[str, Any]) -> None:
    """Writes one SAE's evaluation.json and its density plot."""
    write_json(folder / "evaluation.json", record, indent=1)
    plot_density(record, folder / "density.png")


def write_report(output: Path, records: list[dict[str, Any]]) -> None:
    """Writes evaluation.json and report.md over all SAEs, and plots of FVU against L0 and against
    what a grid varied.
    """
    write_text(output / "evaluation.json", json.dumps(records, indent=1) + "\n")
    write_text(output / "report.md", _markdown(records, plot_frontiers(records, output)))
    # A list has no place for a checksum of its own.
    write_checksums(output, ["evaluation.json", "report.md"])


_COLUMNS = (
    "SAE",
    "L0",
    "FVU",
    "cosine",
    "never fired",
    "loss",
    "with SAE",
    "with zeros",
    "recovered",
)


def _cells(r: dict[str, Any]) -> list[str]:
    forms = {"l0": ".1f", "fvu": ".4f", "cosine": ".4f", "never_fired_fraction": ".1%"}
    cells = [r["job"], *(_cell(r[name], form) for name, form in forms.items())]
    loss = r.get("loss", {})
    cells += [_cell(loss.get(name), ".3f") for name in ("clean", "spliced", "zero")]
    return [*cells, _cell(loss.get("recovered"), ".1%")]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _markdown(records: list[dict[str, Any]], plots: list[str]) -> str:
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    lines += [" | ".join(_cells(r)) for r in records]
    body = "\n".join(f"| {line} |" for line in lines)
    note = (
        f"FVU, cosine, L0, densities and the latents that never fired are of {_rows(records)}, "
        "which training may have seen (its own dead latents are those that did not fire for "
        "train.dead_after_tokens); losses, in nats a token, are of text after the cached part, or "
        "of the last of it where the text ends there. A dash stands for what is no number: where "
        "zeros in place of the activations do not raise the loss, there is none to recover."
    )
    images = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots)
    return f"# Evaluation\n\n{body}\n\n{note}\n\n{images}\n"


def _rows(records: list[dict[str, Any]]) -> str:
    return f"{max(r['tokens'] for r in records):,} stored rows"


def table(records: list[dict[str, Any]]) -> Table:
    """The same table for a terminal."""
    out = Table(title=f"evaluation on {_rows(records)} (losses in nats a token)")
    # Names of a grid differ in their last letters: broken, never cut.
    out.add_column(_COLUMNS[0], overflow="fold")
    for column in _COLUMNS[1:]:
        out.add_column(column, justify="right", no_wrap=True)
    for record in records:
        out.add_row(*(Text(cell) for cell in _cells(record)))
    return out
