"""Plots of evaluations at the size of the grids that are shipped: nothing hidden, cut or alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from flash_sae_dist.evaluation import plots
from flash_sae_dist.evaluation.metrics import ReconstructionMetrics
from flash_sae_dist.evaluation.report import evaluation_record, write_report
from flash_sae_dist.evaluation.results import natural

HOOKPOINTS = [f"model.layers.{n}{side}" for n in (12, 18, 6) for side in ("", ".mlp")]


def record(hookpoint: str, values: str, k: int, d_sae: int) -> dict[str, Any]:
    m = ReconstructionMetrics(
        100, 1 / k, 2.0, 0.9, 0.98, 0.97, k, 0.1, torch.rand(50, dtype=torch.float64)
    )
    return evaluation_record(f"{hookpoint}/{values}", hookpoint, k, d_sae, m, None)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Figures by the name of their file, laid out."""
    figures: dict[str, Any] = {}

    def save(figure: Any, path: Path) -> None:
        FigureCanvasAgg(figure).draw()
        figures[path.name] = figure

    monkeypatch.setattr(plots, "_save", save)
    return figures


def inside(inner: Any, outer: Any) -> bool:
    return bool(
        outer.x0 <= inner.x0
        and outer.y0 <= inner.y0
        and inner.x1 <= outer.x1 + 1
        and inner.y1 <= outer.y1 + 1
    )


def test_a_grid_of_36_is_told_apart(drawn: dict[str, Any]) -> None:
    """configs/gemma-2-2b-grid.yaml: six hookpoints, two widths, three values of k."""
    records = [
        record(h, f"d_sae={d},k={k}", k, d)
        for h in HOOKPOINTS
        for d in (16384, 65536)
        for k in (128, 32, 64)
    ]
    assert plots.plot_frontiers(records, Path()) == ["fvu_l0.png"]
    figure = drawn["fvu_l0.png"]
    (axes,), (legend,) = figure.axes, figure.legends
    looks = {(str(line.get_color()), line.get_linestyle()) for line in axes.lines}
    assert len(looks) == len(axes.lines) == 12
    assert all(list(line.get_xdata()) == [32, 64, 128] for line in axes.lines)
    labels = [text.get_text() for text in legend.get_texts()]
    in_order = [f"model.layers.{n}{side}" for n in (6, 12, 18) for side in ("", ".mlp")]
    assert labels == [*in_order, " ", "d_sae=16384", "d_sae=65536"]
    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
    assert inside(legend.get_window_extent(), figure.bbox)


def test_every_layer_of_a_deep_model_has_a_colour(drawn: dict[str, Any]) -> None:
    records = [record(f"model.layers.{n}", f"k={k}", k, 64) for n in range(80) for k in (2, 4)]
    plots.plot_frontiers(records, Path())
    figure = drawn["fvu_l0.png"]
    assert len({str(line.get_color()) for line in figure.axes[0].lines}) == 80
    assert inside(figure.legends[0].get_window_extent(), figure.bbox)


def test_a_grid_over_learning_rates_is_drawn_along_them(drawn: dict[str, Any]) -> None:
    """All have one L0, so that against it they are one above the other."""
    records = [
        record(h, f"lr={lr},adam_betas=(0.9, {b}),dead_latents={dead}", 4, 64)
        for h in HOOKPOINTS[:2]
        for lr in (0.001, 1e-05)
        for b in (0.99, 0.999)
        for dead in ("auxk", "none")
    ]
    assert plots.plot_frontiers(records, Path()) == ["fvu_l0.png", "fvu_lr.png"]
    (axes,) = drawn["fvu_lr.png"].axes
    assert axes.get_xlabel() == "lr"
    assert axes.get_xscale() == "log"
    assert len(axes.lines) == 8
    assert all(list(line.get_xdata()) == [1e-05, 0.001] for line in axes.lines)
    looks = {(str(x.get_color()), x.get_marker()) for x in drawn["fvu_l0.png"].axes[0].lines}
    assert len(looks) == len(records)
    labels = [text.get_text() for text in drawn["fvu_l0.png"].legends[0].get_texts()]
    assert "adam_betas=(0.9, 0.99), d_sae=64, dead_latents=auxk, lr=1e-05" in labels


def test_curves_of_many_settings_are_told_apart(drawn: dict[str, Any]) -> None:
    """Lines without markers, of one hookpoint and so of one colour."""
    records = [record("h", f"k={k},lr={lr}", k, 64) for k in range(1, 7) for lr in (1, 2, 3, 4)]
    metrics = {r["job"]: [{"tokens": n, "fvu": 1 / n} for n in (1, 2)] for r in records}
    (axes,) = plots.curves(records, metrics).axes
    looks = {(str(x._dash_pattern), x.get_linewidth()) for x in axes.lines}
    assert len(looks) == len(axes.lines) == 24


def test_long_names_stay_on_the_density_plot(drawn: dict[str, Any]) -> None:
    long = record(
        "model.language_model.encoder.layers.12.self_attn.output_projection",
        "adam_betas=(0.9, 0.999),dead_after_tokens=10000000,lr=0.0003,d_sae=65536,k=128",
        128,
        65536,
    )
    plots.plot_density(long, Path("density.png"))
    figure = drawn["density.png"]
    title = figure.axes[0].title
    assert inside(title.get_window_extent(), figure.bbox)
    assert (
        title.get_text().replace("\n", "").replace(" ", "").startswith(long["job"].replace(" ", ""))
    )
    assert "never fired on 100 rows" in title.get_text()


def test_no_number_is_no_point(drawn: dict[str, Any]) -> None:
    assert plots.plot_frontiers([record("h", "k=2", 2, 64) | {"fvu": None}], Path())
    assert not drawn["fvu_l0.png"].axes[0].lines


def test_the_report_shows_every_plot(tmp_path: Path) -> None:
    write_report(tmp_path, [record("h", f"lr={lr}", 2, 64) for lr in (0.1, 0.2)])
    for name in ("fvu_l0.png", "fvu_lr.png", "densities.png", "curves.png"):
        assert f"]({name})" in (tmp_path / "report.md").read_text()
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert not list(tmp_path.glob("*.tmp"))


def with_losses(k: int, kept: float) -> dict[str, Any]:
    return record("h", f"k={k}", k, 64) | {"loss": {"recovered": kept, "kl_recovered": kept}}


def test_losses_are_drawn_against_l0_and_wide_ranges_on_log_axes(drawn: dict[str, Any]) -> None:
    records = [with_losses(2, 0.5), with_losses(64, 0.9)]
    names = plots.plot_frontiers(records, Path())
    assert names == ["fvu_l0.png", "ce_recovered_l0.png", "kl_recovered_l0.png"]
    (axes,) = drawn["ce_recovered_l0.png"].axes
    assert list(axes.lines[0].get_ydata()) == [0.5, 0.9]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear"), "L0 from 2 to 64"
    assert drawn["fvu_l0.png"].axes[0].get_yscale() == "log", "FVU from 1/2 to 1/64"
    assert plots.plot_frontiers([with_losses(2, 0.5), record("h", "k=4", 4, 64)], Path()) == names


def test_densities_and_curves_have_a_line_an_sae(drawn: dict[str, Any]) -> None:
    records = [record(h, f"k={k}", k, 64) for h in HOOKPOINTS[:2] for k in (2, 4)]
    lines = [{"tokens": 10 * n, "fvu": 1 / n} for n in range(1, 2000)]
    metrics = {r["job"]: lines for r in records[1:]}
    plots.plot_all(records, metrics, Path())
    (axes,) = drawn["densities.png"].axes
    assert len(axes.lines) == 4
    counts = axes.lines[0].get_ydata()
    assert sum(counts) == 50
    (axes,) = drawn["curves.png"].axes
    assert len(axes.lines) == 3, "the first has no curve"
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert len(axes.lines[0].get_xdata()) < 400


def test_names_sort_by_their_numbers() -> None:
    for names in (
        ["model.layers.6", "model.layers.6.mlp", "model.layers.12", "model.layers.18"],
        ["h/lr=1e-05", "h/lr=0.0005", "h/lr=0.001", "h/lr=0.01"],
        ["experts.3.9/k=2", "experts.3.9/k=16", "experts.3.10/k=2"],
    ):
        assert sorted(reversed(names), key=natural) == names
