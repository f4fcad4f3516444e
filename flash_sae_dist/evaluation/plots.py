"""Plots of evaluations, readable from one SAE to a grid of dozens: a colour a hookpoint, a marker
and line style for every combination of the other values.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..files import replacing
from .results import natural

_MARKERS = "os^DvPX<>*"
# As many as tell apart, and not a multiple of the markers: so pairs of them come back late. Beyond
# them lines without markers differ in width.
_LINES: tuple[Any, ...] = (
    *("-", "--", ":", "-."),
    *((0, (8, 2)), (0, (1, 4)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 2, 2, 2))),
)
_WIDTHS = (1.2, 2.2, 0.7)
# Inches: a legend's entry is as high as its text, and a column of it as wide as its longest name.
_ENTRY_HEIGHT, _LETTER_WIDTH = 0.19, 0.075
_ENTRIES_A_COLUMN = 40
_CURVE_POINTS = 300
_DENSITY = "log10 of the fraction of tokens on which a latent fires"


class Measure(NamedTuple):
    """What a plot has on its y axis."""

    name: str
    label: str
    of: Callable[[dict[str, Any]], float | None]  # from an evaluation's record


FVU = Measure("fvu", "FVU: fraction of variance unexplained", lambda r: r["fvu"])
MEASURES = (
    FVU,
    Measure(
        "ce_recovered",
        "CE kept (1: as the model, 0: as zeros)",
        lambda r: r.get("loss", {}).get("recovered"),
    ),
    Measure(
        "kl_recovered",
        "KL kept (1: as the model, 0: as zeros)",
        lambda r: r.get("loss", {}).get("kl_recovered"),
    ),
)


class _Series(NamedTuple):
    """A line of a plot."""

    hookpoint: str
    setting: str
    points: list[tuple[float, float]]


class _Axes(NamedTuple):
    """What a plot's axes say."""

    x: str
    y: str
    log: str = ""  # axes that are logarithmic whatever their range
    linear: str = ""
    style: str = "default"  # matplotlib's drawstyle
    marked: bool = True


def plot_density(record: dict[str, Any], path: Path) -> None:
    """Number of latents by firing frequency."""
    h = record["density_histogram"]
    figure, axes = _figure(6, 4)
    axes.stairs(h["counts"], h["log10_edges"], fill=True)
    axes.set_xlabel(_DENSITY)
    axes.set_ylabel("latents")
    never = f"{h['never']} of {record['d_sae']} latents never fired on {record['tokens']:,} rows"
    axes.set_title("\n".join([*textwrap.wrap(record["job"], 70), never]), fontsize=9)
    _save(figure, path)


def plot_frontiers(records: list[dict[str, Any]], output: Path) -> list[str]:
    """Plots what was measured against L0 (fvu_l0.png, ...), and FVU against every other number that
    a grid varied, such as fvu_lr.png; returns the files' names.
    """
    figures = frontiers(records)
    for name, figure in figures.items():
        _save(figure, output / f"{name}.png")
    return [f"{name}.png" for name in figures]


def frontiers(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Those plots' figures by name: fvu_l0 always, ce_recovered_l0 and kl_recovered_l0 where losses
    were measured.
    """
    points = [(r, _values(r)) for r in sorted(records, key=lambda r: natural(r["job"]))]
    figures = {}
    for measure in MEASURES:
        along_l0 = [(r, v, r["l0"], y) for r, v in points if (y := measure.of(r)) is not None]
        if along_l0 or measure is FVU:
            axes = _Axes("L0: active latents a token", measure.label)
            figures[f"{measure.name}_l0"] = _draw(_lines(along_l0, "k"), axes)
    for key in sorted({key for _, values in points for key in values} - {"k", "d_sae"}):
        along = [
            (r, v, x, r["fvu"])
            for r, v in points
            if (x := _number(v.get(key))) is not None and r["fvu"] is not None
        ]
        if len({x for _, _, x, _ in along}) > 1:
            figures[f"fvu_{key}"] = _draw(_lines(along, key), _Axes(key, FVU.label))
    return figures


def densities(records: list[dict[str, Any]]) -> Any:
    """A figure of all SAEs' latents by firing frequency."""
    series = []
    for record in sorted(records, key=lambda r: natural(r["job"])):
        histogram = record["density_histogram"]
        points = zip(histogram["log10_edges"][:-1], histogram["counts"], strict=True)
        series.append(_Series(record["hookpoint"], _setting(_values(record)), list(points)))
    return _draw(series, _Axes(_DENSITY, "latents", linear="xy", style="steps-post", marked=False))


def curves(
    records: list[dict[str, Any]],
    metrics: dict[str, list[dict[str, Any]]],  # lines of metrics.jsonl by job
) -> Any:
    """A figure of FVU over the tokens of training, on logarithmic axes."""
    series = []
    for record in sorted(records, key=lambda r: natural(r["job"])):
        lines = [line for line in metrics.get(record["job"], []) if line.get("fvu", 0) > 0]
        # A picture has no more columns than that.
        lines = lines[:: max(1, len(lines) // _CURVE_POINTS)]
        points = [(float(line["tokens"]), float(line["fvu"])) for line in lines]
        series.append(_Series(record["hookpoint"], _setting(_values(record)), points))
    return _draw(series, _Axes("tokens", "FVU of a training batch", log="xy", marked=False))


def plot_all(
    records: list[dict[str, Any]], metrics: dict[str, list[dict[str, Any]]], output: Path
) -> list[str]:
    """Writes the plots of a report; their files' names."""
    names = plot_frontiers(records, output)
    _save(densities(records), output / "densities.png")
    _save(curves(records, metrics), output / "curves.png")
    return [*names, "densities.png", "curves.png"]


def _values(record: dict[str, Any]) -> dict[str, str]:
    """What sets an SAE apart from others of its hookpoint: the values in its job's name, the width,
    and the run's folder where there are several.
    """
    values = {"k": str(record["k"])}
    folders = []
    for part in Path(record["job"]).parts:
        found = re.findall(r"(\w+)=(\([^)]*\)|[^,]*)", part)
        values |= dict(found)
        if not found and part != record["hookpoint"]:
            folders.append(part)
    if folders:
        values["run"] = "/".join(folders)
    if "expansion_factor" not in values:
        values["d_sae"] = str(record["d_sae"])
    return values


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _setting(values: dict[str, str], without: str = "") -> str:
    return ", ".join(f"{k}={v}" for k, v in sorted(values.items()) if k != without)


def _lines(
    points: list[tuple[dict[str, Any], dict[str, str], float, float]], along: str
) -> list[_Series]:
    """A line for all points (x, y behind a record and its values) that differ in `along` alone."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record, values, x, y in points:
        lines.setdefault((record["hookpoint"], _setting(values, along)), []).append((x, y))
    return [_Series(*names, sorted(line)) for names, line in lines.items()]


def _draw(series: list[_Series], titles: _Axes) -> Any:
    hookpoints = sorted({line.hookpoint for line in series}, key=natural)
    settings = sorted({line.setting for line in series}, key=natural)
    names = [*hookpoints, " ", *settings]
    columns = -(-len(names) // _ENTRIES_A_COLUMN)
    figure, axes = _figure(
        6 + columns * (0.7 + _LETTER_WIDTH * max(map(len, names))),
        max(4, 0.2 + _ENTRY_HEIGHT * -(-len(names) // columns)),
    )
    colours = dict(zip(hookpoints, _colours(len(hookpoints)), strict=True))
    joined = any(len(line.points) > 1 for line in series)
    looks = {name: _look(n, joined, titles.marked) for n, name in enumerate(settings)}
    for line in (line for line in series if line.points):
        how = looks[line.setting] | {"drawstyle": titles.style, "color": colours[line.hookpoint]}
        axes.plot(*zip(*line.points, strict=True), **how)
    axes.set_xlabel(titles.x)
    axes.set_ylabel(titles.y)
    for axis, values in (
        ("x", [x for line in series for x, _ in line.points]),
        ("y", [y for line in series for _, y in line.points]),
    ):
        if values and _is_wide(values, axis, titles):
            getattr(axes, f"set_{axis}scale")("log")
    if series:
        _legend(figure, colours, looks, columns)
    return figure


def _is_wide(values: list[float], axis: str, titles: _Axes) -> bool:
    """Whether an axis is to be logarithmic."""
    if axis in titles.linear or min(values) <= 0:
        return False
    return axis in titles.log or max(values) >= 10 * min(values)


def _look(number: int, joined: bool, marked: bool) -> dict[str, Any]:
    line = _LINES[number % len(_LINES)] if joined else "none"
    if marked:
        return {"marker": _MARKERS[number % len(_MARKERS)], "linestyle": line, "markersize": 5}
    return {"linestyle": line, "linewidth": _WIDTHS[number // len(_LINES) % len(_WIDTHS)]}


def _colours(count: int) -> list[Any]:
    from matplotlib import colormaps

    if count <= 10:
        return [colormaps["tab10"](n) for n in range(count)]
    return [colormaps["turbo"](n / (count - 1)) for n in range(count)]


def _legend(
    figure: Any, colours: dict[str, Any], looks: dict[str, dict[str, Any]], columns: int
) -> None:
    """Beside the plot, where it hides no point: hookpoints by colour, then settings in black."""
    from matplotlib.lines import Line2D

    entries = [Line2D([], [], color=colour, lw=4, label=h) for h, colour in colours.items()]
    entries.append(Line2D([], [], linestyle="none", label=" "))
    entries += [Line2D([], [], color="black", label=s, **look) for s, look in looks.items()]
    figure.legend(
        handles=entries, loc="outside right upper", fontsize=8, ncols=columns, handlelength=3
    )


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    # Figure alone, not pyplot: no display and no state between plots.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=120)
