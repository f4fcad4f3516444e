"""Evaluations as files and pictures: evaluation.json an SAE, one for all, a table, plots."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from rich.text import Text
from torch import Tensor

from ..files import add_checksums, replacing, write_checksums, write_json, write_text
from ..training.metrics import read_metrics
from .loss_recovered import LossRecovered
from .metrics import ReconstructionMetrics, density_histogram
from .plots import plot_all, plot_density


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
            "explained_variance": m.explained_variance,
            "mse": m.mse,
            "cosine": m.cosine,
            "l2_ratio": m.l2_ratio,
            "relative_bias": m.relative_bias,
            "l0": m.l0,
            "never_fired_fraction": m.dead_fraction,
        }
    )
    record["density_histogram"] = density_histogram(m.density)._asdict()
    if loss is not None:
        shares = {"recovered": loss.recovered, "kl_recovered": loss.kl_recovered}
        record["loss"] = _finite(loss._asdict() | shares)
    return record


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def write_evaluation(folder: Path, record: dict[str, Any], density: Tensor) -> None:
    """Writes one SAE's evaluation.json, the density of each latent [d_sae] as densities.npy, and
    their plot."""
    with replacing(folder / "densities.npy") as partial, partial.open("wb") as file:
        np.save(file, density.float().numpy())
    write_json(folder / "evaluation.json", record, indent=1)
    add_checksums(folder, ["densities.npy", "evaluation.json"])
    plot_density(record, folder / "density.png")


def write_report(output: Path, records: list[dict[str, Any]]) -> None:
    """Writes evaluation.json and report.md over all SAEs, and plots: what was measured against L0
    and against what a grid varied, densities, curves of training.
    """
    metrics = {r["job"]: read_metrics(output / r["job"] / "metrics.jsonl") for r in records}
    write_text(output / "evaluation.json", json.dumps(records, indent=1) + "\n")
    write_text(output / "report.md", _markdown(records, plot_all(records, metrics, output)))
    # A list has no place for a checksum of its own.
    write_checksums(output, ["evaluation.json", "report.md"])


_COLUMNS = (
    "SAE",
    "L0",
    "FVU",
    "cosine",
    "L2 ratio",
    "never fired",
    "CE",
    "with SAE",
    "CE kept",
    "KL kept",
)
_FORMS = {
    "l0": ".1f",
    "fvu": ".4f",
    "cosine": ".4f",
    "l2_ratio": ".3f",
    "never_fired_fraction": ".1%",
}


def _cells(r: dict[str, Any]) -> list[str]:
    cells = [r["job"], *(_cell(r.get(name), form) for name, form in _FORMS.items())]
    loss = r.get("loss", {})
    cells += [_cell(loss.get(name), ".3f") for name in ("clean", "spliced")]
    return [*cells, *(_cell(loss.get(name), ".1%") for name in ("recovered", "kl_recovered"))]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _markdown(records: list[dict[str, Any]], plots: list[str]) -> str:
    lines = [" | ".join(_COLUMNS), " | ".join("---" for _ in _COLUMNS)]
    lines += [" | ".join(_cells(r)) for r in records]
    body = "\n".join(f"| {line} |" for line in lines)
    note = (
        f"FVU, cosine, L2 ratio, L0, densities and the latents that never fired are of "
        f"{_rows(records)} (training's own dead latents are those that did not fire for "
        "train.dead_after_tokens); CE, the cross-entropy in nats a token, is of text after the "
        "cached part, or of the last of it where the text ends there. CE kept and KL kept are the "
        "shares of the damage that zeros do which the SAE does not: 100% for a perfect one. A dash "
        "stands for what is no number: where zeros in place of the activations do not raise the "
        "loss, there is none to recover."
    )
    images = "\n\n".join(f"![{name.removesuffix('.png')}]({name})" for name in plots)
    return f"# Evaluation\n\n{body}\n\n{note}\n\n{images}\n"


def _rows(records: list[dict[str, Any]]) -> str:
    kinds = sorted({r.get("rows", "stored rows") for r in records})
    return f"{max(r['tokens'] for r in records):,} stored rows ({'; '.join(kinds)})"


def table(records: list[dict[str, Any]]) -> Table:
    """The same table for a terminal."""
    out = Table(title=f"evaluation on {_rows(records)} (CE in nats a token)")
    # Names of a grid differ in their last letters: broken, never cut.
    out.add_column(_COLUMNS[0], overflow="fold")
    for column in _COLUMNS[1:]:
        out.add_column(column, justify="right", no_wrap=True)
    for record in records:
        out.add_row(*(Text(cell) for cell in _cells(record)))
    return out
