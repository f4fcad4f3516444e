"""What became of every SAE under an output folder, in one place: results.json, results.csv and
report.html, from what training, `evaluate` and `features` left.
"""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..config.base import UserError
from ..files import add_checksums, read_json, write_json, write_text
from ..models.saved import CONFIG_FILE, read_spec
from ..training.job import Config
from ..training.metrics import read_metrics
from ..training.records import job_folders, read_job, read_status

logger = logging.getLogger(__name__)
# A chart has no more columns than that.
_CURVE_POINTS = 150
_TRAINING = ("fvu", "l0", "dead_fraction", "tokens_per_s", "lr")
_EVALUATION = (
    *("tokens", "fvu", "explained_variance", "mse", "cosine", "l2_ratio", "relative_bias", "l0"),
    "never_fired_fraction",
)
_LOSS = ("clean", "spliced", "zero", "recovered", "kl_spliced", "kl_zero", "kl_recovered")
_HEAD = ("job", "hookpoint", "architecture", "d_sae", "k", "state", "step", "total_steps")
_DATA = "/*data*/null"


def results(output: Path, evaluations: Iterable[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """A record of each job under a folder, and of each evaluation that is of none of them, sorted
    by name with its numbers by their size. A job whose files are damaged is left out, as a warning
    says.
    """
    found: dict[str, dict[str, Any]] = {}
    for folder in job_folders(output):
        name = str(folder.relative_to(output))
        try:
            config = read_job(folder)
            if config is not None:
                found[name] = _result(name, folder, config)
        except UserError as e:
            logger.warning("%s is left out of the report: %s", name, e)
    for record in evaluations:
        of_none = {"job": record["job"], "values": {}, "state": "evaluated", "curve": []}
        of_none |= {key: record.get(key) for key in ("hookpoint", "k", "d_sae")}
        found.setdefault(record["job"], of_none)["evaluation"] = record
    return [found[name] for name in sorted(found, key=natural)]


def natural(name: str) -> list[str | float]:
    """Sorting key of a name: numbers in it by their size, so that layer 6 is before 12 and lr=1e-05
    before lr=0.001.
    """
    # Only a value has decimals; the dots of a module's name part numbers.
    parts = re.split(r"((?<==)\d+(?:\.\d+)?(?:e[+-]?\d+)?|\d+)", name)
    return [float(part) if n % 2 else part for n, part in enumerate(parts)]


def _result(name: str, folder: Path, config: Config) -> dict[str, Any]:
    status, lines = read_status(folder), read_metrics(folder / "metrics.jsonl")
    assert config.sae is not None
    assert config.train is not None
    spec: dict[str, Any] = {"architecture": config.sae.architecture, "d_sae": config.sae.d_sae}
    if (folder / "sae" / CONFIG_FILE).is_file():
        try:
            spec = read_spec(folder / "sae")
        except (OSError, ValueError) as e:
            raise UserError(f"{folder}/sae is damaged ({e}); train it anew") from e
    return {
        "job": name,
        "hookpoint": config.train.hookpoint,
        "architecture": spec.get("architecture"),
        "d_sae": spec.get("d_sae"),
        "k": getattr(config.sae, "k", None),
        "values": _values(config),
        "state": status.state if status else "waiting",
        "step": status.step if status else 0,
        "total_steps": status.total_steps if status else None,
        "error": status.error if status else None,
        "tokens": lines[-1]["tokens"] if lines else 0,
        "training": {key: _finite(lines[-1].get(key)) for key in _TRAINING} if lines else None,
        "curve": _curve(lines),
        "evaluation": _evaluation(folder),
        "features": f"{name}/features/index.html"
        if (folder / "features" / "index.html").is_file()
        else None,
    }


def _values(config: Config) -> dict[str, Any]:
    """What the grid varied, as this job has it."""
    data = config.model_dump(mode="json")
    found: dict[str, Any] = {}
    for key in sorted(config.grid.varied_keys()) if config.grid is not None else ():
        section, _, field = key.partition(".")
        found[key] = (data.get(section) or {}).get(field)
    return found


def _finite(value: float | None) -> float | None:
    """JSON has no word for what is no finite number."""
    return value if value is not None and math.isfinite(value) else None


def _curve(lines: list[dict[str, Any]]) -> list[list[float]]:
    """(tokens, FVU) over training, few enough for a chart, the last one always."""
    points = [[line["tokens"], fvu] for line in lines if (fvu := _finite(line.get("fvu")))]
    step = max(1, -(-len(points) // _CURVE_POINTS))
    kept = points[::-1][::step][::-1]
    return [[tokens, float(f"{fvu:.4g}")] for tokens, fvu in kept]


def _evaluation(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_json(folder / "evaluation.json")
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(f"{folder}/evaluation.json is damaged ({e}); run evaluate again") from e
    record.pop("made_of", None)
    return record


def write_results(output: Path, evaluations: Iterable[dict[str, Any]] = ()) -> None:
    """Writes results.json, results.csv and report.html into the folder."""
    found = results(output, evaluations)
    write_json(output / "results.json", {"jobs": found}, indent=1)
    write_text(output / "results.csv", _csv(found))
    template = files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    data = json.dumps({"output": output.resolve().name, "jobs": found}, separators=(",", ":"))
    # A name may hold what ends a script.
    write_text(output / "report.html", template.replace(_DATA, data.replace("</", "<\\/")))
    add_checksums(output, ["results.json", "results.csv", "report.html"])


def _csv(found: list[dict[str, Any]]) -> str:
    varied = list(dict.fromkeys(key for result in found for key in result["values"]))
    varied = [key for key in varied if key not in ("sae.k", "sae.d_sae")]
    columns = [*_HEAD, *varied, "tokens", *(f"train_{key}" for key in _TRAINING)]
    columns += [f"eval_{key}" for key in _EVALUATION]
    columns += [*(f"loss_{key}" for key in _LOSS), "features"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for result in found:
        evaluation = result.get("evaluation") or {}
        row = dict(result) | result["values"]
        for head, part in (
            ("train", result.get("training")),
            ("eval", evaluation),
            ("loss", evaluation.get("loss")),
        ):
            row |= {f"{head}_{key}": value for key, value in (part or {}).items()}
        writer.writerow(row)
    return text.getvalue()
