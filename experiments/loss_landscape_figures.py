"""Figures, table and tidy rows of ``loss_landscape``, made from ``results.json`` alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import RC, Target, entitle
from experiments.harness.matched_epochs import LandscapeRecord, PlaneRecord, Surface
from experiments.harness.record import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_errors", "draw_losses", "draw_row", "report", "tidy_rows"]

# What a finished run holds; its config is a `LandscapeConfig`.
_Finished = Results[Any, LandscapeRecord[float], LandscapeRecord[Interval]]

_RED, _BLUE = "#D55E00", "#0072B2"
_NUM_LEVELS = 22
# Losses outside these, in nats, have the colours of the ends of the scale: the far corners of a plane tell
# nothing about the networks, and would take all colours.
_LOSSES = (0.003, 10.0)


def draw_row(results: _Finished, target: Target) -> None:
    """Draw the loss in the planes of the first epoch t, one for each match epoch s: figure 22.

    One row for each matching method.
    """
    first = results.config.epochs[0]
    rows = [
        [plane for plane in results.records[0].planes if plane.epoch == first] for _ in results.config.methods
    ]
    _draw(results, target, "loss", rows, results.config.methods)


def draw_losses(results: _Finished, target: Target) -> None:
    """Draw the loss in all planes, a row for each match epoch s and a column for each epoch t: figure 23."""
    _draw_all(results, target, "loss")


def draw_errors(results: _Finished, target: Target) -> None:
    """Draw the error in all planes, as `draw_losses`."""
    _draw_all(results, target, "error")


def _draw_all(results: _Finished, target: Target, metric: str) -> None:
    planes, rows, methods = results.records[0].planes, [], []
    for method in results.config.methods:
        for s in results.config.epochs:
            rows.append([plane for plane in planes if plane.match_epoch == s])
            methods.append(method)
    _draw(results, target, metric, rows, methods)


def _draw(
    results: _Finished,
    target: Target,
    metric: str,
    rows: Sequence[Sequence[PlaneRecord[float]]],
    methods: Sequence[str],
) -> None:
    """Draw one panel for each plane, under the matching method of its row."""
    config, columns = results.config, len(rows[0])
    norm, levels = _scale(metric, results)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(1.1 + 2.5 * columns, 1.35 + 2.35 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), columns, squeeze=False)
        for row, planes, method in zip(panels, rows, methods, strict=True):
            for axes, plane in zip(row, planes, strict=True):
                surface = plane.methods[method].surface
                if surface is not None:
                    _draw_surface(axes, surface, metric, norm, levels)
                    _draw_networks(axes, surface, plane.epoch, config.recipe.epochs)
                name = f"{method}, " if len(config.methods) > 1 else ""
                axes.set_title(f"{name}$s={plane.match_epoch}$, $t={plane.epoch}$", loc="left", fontsize=8)
        label = "train loss (nats)" if metric == "loss" else "train error (%)"
        shading = ScalarMappable(norm, "viridis")
        bar = figure.colorbar(shading, ax=panels, shrink=0.9 if len(rows) == 1 else 0.5, label=label)
        ticks = [0.01, 0.1, 1, 10] if metric == "loss" else [0, 25, 50, 75, 100]
        bar.set_ticks([t for t in ticks if levels[0] <= t * 1.001 and t * 0.999 <= levels[-1]])
        bar.ax.minorticks_off()
        figure.legend(*_legend(), loc="outside lower center", ncols=5, fontsize=7)
        entitle(
            figure,
            results,
            "networks",
            "planes of the first pair through $A_{\\mathrm{end}}$, $A_t$ and $P_s[B_t]$, in true distances",
        )
        figure.savefig(target, metadata={"Software": None})


def _scale(metric: str, results: _Finished) -> tuple[Any, np.ndarray]:
    """Return the colours and the levels that all panels share."""
    if metric == "error":
        return Normalize(0, 100), np.linspace(0, 100, 21)
    surfaces = [own.surface for plane in results.records[0].planes for own in plane.methods.values()]
    lowest = min(np.min(surface.loss) for surface in surfaces if surface is not None)
    low, high = max(_LOSSES[0], float(lowest)), _LOSSES[1]
    return LogNorm(low, high), np.geomspace(low, high, _NUM_LEVELS)


def _draw_surface(axes: Axes, surface: Surface, metric: str, norm: Any, levels: np.ndarray) -> None:
    """Draw the contours of a plane, with equal scales on both axes."""
    values = np.array(surface.loss) if metric == "loss" else 100 * np.array(surface.error)
    values = np.clip(values, levels[0], levels[-1])
    axes.contourf(surface.x, surface.y, values, levels, norm=norm, cmap="viridis", extend="both")
    axes.contour(surface.x, surface.y, values, levels[3:-1:3], colors="white", linewidths=0.3, alpha=0.6)
    axes.set_aspect("equal")
    axes.spines[["top", "right"]].set_visible(True)
    axes.tick_params(labelsize=6)


def _draw_networks(axes: Axes, surface: Surface, epoch: int, last: int) -> None:
    """Draw both trajectories, and mark A_end, A_t and P_s[B_t]."""
    for path, colour in ((surface.path_a, _RED), (surface.path_b, _BLUE)):
        x, y = [point.x for point in path], [point.y for point in path]
        axes.plot(x, y, color="white", linewidth=2.0)
        axes.plot(x, y, color=colour, linewidth=1.0, marker=".", markersize=2.5)
        for at, marker, size in ((epoch, "X", 40), (last, "*", 70)):
            # P_s[B_end] is no anchor of the plane, and is marked as the end of its trajectory.
            point = next(point for point in path if point.epoch == at)
            look = {"color": colour, "edgecolors": "white", "linewidths": 0.7, "zorder": 3}
            axes.scatter(point.x, point.y, s=size, marker=marker, **look)


def _legend() -> tuple[list[Any], list[str]]:
    marks = [
        (_RED, "*", r"$A_{\mathrm{end}}$"),
        (_RED, "X", "$A_t$"),
        (_BLUE, "X", "$P_s[B_t]$"),
        (_BLUE, "*", r"$P_s[B_{\mathrm{end}}]$, projected"),
    ]
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=6, linestyle="none")
        for colour, marker, _ in marks
    ]
    lines = Line2D([], [], color="#777777", marker=".", markersize=3, linewidth=1)
    return [*handles, lines], [*(label for _, _, label in marks), "trajectories, projected"]


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, plane, method and metric: the ridge between A_t and P_s[B_t]."""
    for replicate, record in enumerate(results.records):
        for plane in record.planes:
            for method, own in plane.methods.items():
                for metric in METRICS:
                    yield {
                        "replicate": replicate,
                        "method": method,
                        "match_epoch": plane.match_epoch,
                        "epoch": plane.epoch,
                        "metric": metric,
                        "ridge": f"{getattr(own.ridge, metric):.6g}",
                    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of ridges for each method."""
    config, summary = results.config, results.require_summary()
    reporter.say("\nRidge between A_t and P_s[B_t]: test error barriers in %,")
    reporter.say(describe_mean(config.replicates))
    for method in config.methods:
        rows = [
            [
                str(s),
                *(
                    cell(plane.methods[method].ridge.test_error, percent=True)
                    for plane in summary.planes
                    if plane.match_epoch == s
                ),
            ]
            for s in config.epochs
        ]
        reporter.say(f"\n{method}")
        reporter.table(["s", *(f"t={t}" for t in config.epochs)], rows)
