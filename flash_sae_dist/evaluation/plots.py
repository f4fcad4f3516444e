"""Plots of evaluations, readable from one SAE to a grid of dozens: a colour a hookpoint, a marker
and line style for every combination of the other values.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

from ..files import replacing

_MARKERS = "os^DvPX<>*"
_LINES = ("-", "--", ":", "-.")
# Inches: a legend's entry is as high as its text, and a column of it as wide as its longest name.
_ENTRY_HEIGHT, _LETTER_WIDTH = 0.19, 0.075
_ENTRIES_A_COLUMN = 40


def natural(name: str) -> list[str | float]:
    """Sorting key of a name: numbers in it by their size, so that layer 6 is before 12 and lr=1e-05
    before lr=0.001.
    """
    # Only a value has decimals; the dots of a module's name part numbers.
    parts = re.split(r"((?<==)\d+(?:\.\d+)?(?:e[+-]?\d+)?|\d+)", name)
    return [float(part) if n % 2 else part for n, part in enumerate(parts)]


def plot_density(record: dict[str, Any], path: Path) -> None:
    """Number of latents by firing frequency."""
    h = record["density_histogram"]
    figure, axes = _figure(6, 4)
    axes.stairs(h["counts"], h["log10_edges"], fill=True)
    axes.set_xlabel("log10 of the fraction of tokens on which a latent fires")
    axes.set_ylabel("latents")
    never = f"{h['never']} of {record['d_sae']} latents never fired on {record['tokens']:,} rows"
    axes.set_title("\n".join([*textwrap.wrap(record["job"], 70), never]), fontsize=9)
    _save(figure, path)


def plot_frontiers(records: list[dict[str, Any]], output: Path) -> list[str]:
    """Plots FVU against L0 (fvu_l0.png), and against every other number that a grid varied, such as
    fvu_lr.png; returns the files' names.
    """
    measured = [r for r in records if r["fvu"] is not None]
    points = [(r, _values(r)) for r in sorted(measured, key=lambda r: natural(r["job"]))]
    _plot_lines([(r, v, r["l0"]) for r, v in points], "k", output / "fvu_l0.png")
    names = ["fvu_l0.png"]
    for key in sorted({key for _, values in points for key in values} - {"k", "d_sae"}):
        along = [(r, v, x) for r, v in points if (x := _number(v.get(key))) is not None]
        if len({x for _, _, x in along}) > 1:
            names.append(f"fvu_{key}.png")
            _plot_lines(along, key, output / names[-1])
    return names


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


def _plot_lines(
    points: list[tuple[dict[str, Any], dict[str, str], float]], along: str, path: Path
) -> None:
    """A line for all points that differ in `along` alone, which is their third part."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for record, values, x in points:
        setting = ", ".join(f"{k}={v}" for k, v in sorted(values.items()) if k != along)
        lines.setdefault((record["hookpoint"], setting), []).append((x, record["fvu"]))
    hookpoints = sorted({hookpoint for hookpoint, _ in lines}, key=natural)
    settings = sorted({setting for _, setting in lines}, key=natural)
    names = [*hookpoints, " ", *settings]
    columns = -(-len(names) // _ENTRIES_A_COLUMN)
    figure, axes = _figure(
        6 + columns * (0.7 + _LETTER_WIDTH * max(map(len, names))),
        max(4, 0.2 + _ENTRY_HEIGHT * -(-len(names) // columns)),
    )
    colours = dict(zip(hookpoints, _colours(len(hookpoints)), strict=True))
    joined = any(len(line) > 1 for line in lines.values())
    looks = {name: _look(n, joined) for n, name in enumerate(settings)}
    for (hookpoint, setting), line in lines.items():
        axes.plot(*zip(*sorted(line), strict=True), color=colours[hookpoint], **looks[setting])
    axes.set_xlabel("L0: active latents a token" if along == "k" else along)
    axes.set_ylabel("FVU: fraction of variance unexplained")
    xs = [x for _, _, x in points]
    if along != "k" and min(xs) > 0 and max(xs) >= 10 * min(xs):
        axes.set_xscale("log")
    if lines:
        _legend(figure, colours, looks, columns)
    _save(figure, path)


def _look(number: int, joined: bool) -> dict[str, Any]:
    line = _LINES[number % len(_LINES)] if joined else "none"
    return {"marker": _MARKERS[number % len(_MARKERS)], "linestyle": line, "markersize": 5}


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
