"""The figures of ``training_trajectories``, drawn from ``results.json`` alone."""

from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.harness.figures import (
    GROUND,
    METRIC_LABELS,
    RC,
    Style,
    Target,
    draw_band,
    dress_epochs,
    entitle,
    share_legend,
)
from experiments.harness.results import Results

__all__ = ["draw_fixed_permutations", "draw_permutations", "draw_trajectories"]

_STYLES = {
    "end": Style(r"$P_{\mathrm{end}}$, from the last epoch", "#0072B2"),
    "same_epoch": Style(r"$P_t$, from that very epoch", "#D55E00", (0, (5, 2))),
    "at_end": Style(r"$P_t$, applied at the last epoch", "#009E73", (0, (5, 1, 1, 1))),
}
_DASHES = ("solid", (0, (4, 1.5)), (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))

# Layers up to which each has its band and its name.
_FEW = 6


def draw_trajectories(results: Results, target: Target) -> None:
    """Barriers over training, as figures 1 left, 4, 8 (columns 1 and 3), 9 and 15 (left and right).

    One row for each matching method. Left: error barrier of A_t and B_t at each epoch; middle: loss barrier;
    right: error barrier at the last epoch under permutations from each epoch. Lines are means on test data,
    bands one standard deviation over replicates, dots the mean on train data.
    """
    summary = results.summary
    epochs = summary["epochs"]
    with mpl.rc_context(RC):
        figure, panels = _canvas(
            results, columns=3, note="lines: test data (bands: ± standard deviation), dots: train data"
        )
        for row, (method, own) in zip(panels, summary["methods"].items(), strict=True):
            for axes, metric, names in (
                (row[0], "error", ("none", "same_epoch", "end")),
                (row[1], "loss", ("none", "same_epoch", "end")),
                (row[2], "error", ("none", "at_end")),
            ):
                scale, label = METRIC_LABELS[f"test_{metric}"]
                for name in names:
                    series = {"none": summary["unaligned"], **own["barriers"]}[name]
                    level = axes is row[2] and name == "none"
                    style = _STYLES.get(name, GROUND)
                    draw_band(axes, epochs, _level(series[f"test_{metric}"], level), style, scale)
                    train = scale * np.array(_level(series[f"train_{metric}"], level)["mean"])
                    axes.plot(epochs, train, color=style.colour, linestyle="none", marker=".", markersize=3)
                dress_epochs(axes, epochs)
                axes.set(ylabel=label, xlabel="epoch $t$ of the networks")
            row[0].set_title(f"matching of {method}", loc="left")
            row[1].set_title(r"$A_t$ and $P[B_t]$", loc="left")
            row[2].set_title("networks at the last epoch", loc="left")
            row[2].set_xlabel("epoch $t$ of the permutation")
        share_legend(figure, list(panels[0]))
        figure.savefig(target, metadata={"Software": None})


def draw_fixed_permutations(results: Results, target: Target) -> None:
    """Barriers over training under permutations from chosen epochs: figures 7, 8 (column 2), 10, 15 (middle).

    One row for each matching method; columns as figure 10: test error, train error, test loss, train loss.
    """
    summary = results.summary
    epochs, matched = summary["epochs"], summary["match_epochs"]
    with mpl.rc_context(RC):
        figure, panels = _canvas(
            results, columns=4, note=r"$A_t$ and $P_s[B_t]$, bands: ± standard deviation"
        )
        for row, (method, own) in zip(panels, summary["methods"].items(), strict=True):
            for axes, metric in zip(row, METRIC_LABELS, strict=True):
                scale, label = METRIC_LABELS[metric]
                draw_band(axes, epochs, summary["unaligned"][metric], GROUND, scale)
                for style, series in zip(_shades(matched), own["fixed"][metric], strict=True):
                    draw_band(axes, epochs, series, style, scale)
                dress_epochs(axes, epochs)
                axes.set(ylabel=label, xlabel="epoch $t$ of the networks")
            row[0].set_title(f"matching of {method}", loc="left")
        share_legend(figure, list(panels[0]), columns=min(len(matched) + 1, 10))
        figure.savefig(target, metadata={"Software": None})


def draw_permutations(results: Results, target: Target) -> None:
    """Distances and fixed points over training: appendix H.1 and figure 21.

    One row for each matching method. Left: distance of A_t to P[B_t]; middle: share of units that P_t and
    P_end place alike, dotted that of the identity; right: the same for each group, in order of depth.
    """
    summary = results.summary
    epochs = summary["epochs"]
    with mpl.rc_context(RC):
        figure, panels = _canvas(results, columns=3, note="bands: ± standard deviation")
        for row, (method, own) in zip(panels, summary["methods"].items(), strict=True):
            draw_band(row[0], epochs, summary["distance"], GROUND)
            for name in ("end", "same_epoch"):
                draw_band(row[0], epochs, own["distance"][name], _STYLES[name])
            row[0].set(ylabel=r"$\|A_t - P[B_t]\|_2$", xlabel="epoch $t$ of the networks")
            row[0].set_title(f"matching of {method}", loc="left")
            dress_epochs(row[0], epochs, bottom=None)
            row[0].legend(fontsize=7)
            points = own["fixed_points"]
            draw_band(row[1], epochs, points["total"], Style("$P_t$", "#000000"), 100)
            base = 100 * points["identity"]["total"]["mean"]
            row[1].axhline(base, color=GROUND.colour, linestyle=GROUND.dashes, label="identity")
            row[1].legend(fontsize=7)
            groups = list(points["groups"])
            for style, group in zip(_shades(_layer_names(groups), "{}"), groups, strict=True):
                series = points["groups"][group]
                # The bands of many layers would cover each other.
                spread = series if len(groups) <= _FEW else {**series, "deviation": [None] * len(epochs)}
                draw_band(row[2], epochs, spread, style, 100)
            row[2].legend(fontsize=7)
            for axes, title in ((row[1], "all units"), (row[2], "by layer")):
                axes.set(ylabel=r"placed as by $P_{\mathrm{end}}$ (%)", xlabel="epoch $t$ of the permutation")
                axes.set_title(title, loc="left")
                dress_epochs(axes, epochs)
                axes.set_ylim(0, 103)
        figure.savefig(target, metadata={"Software": None})


def _canvas(results: Results, *, columns: int, note: str) -> tuple[Figure, Any]:
    """A figure with one row for each method, and a line that says what was measured."""
    rows = len(results.summary["methods"])
    figure = Figure(figsize=(3.2 * columns if columns < 4 else 11.2, 0.9 + 2.2 * rows), layout="constrained")
    # Methods are compared down a column.
    panels = figure.subplots(rows, columns, squeeze=False, sharey="col")
    entitle(figure, results, "networks", f"; {note}")
    return figure, panels


def _layer_names(groups: list[str]) -> list[str]:
    """Short names of groups; of many, five evenly spaced: a leading underscore hides a line in a legend."""
    short = [group.removeprefix("params/").removesuffix("/kernel") for group in groups]
    named = set(np.linspace(0, len(groups) - 1, 5).round().astype(int).tolist())
    return [name if len(groups) <= _FEW or i in named else f"_{name}" for i, name in enumerate(short)]


def _level(series: dict[str, Any], constant: bool) -> dict[str, Any]:
    """The series, or its last value at every epoch, as a level to compare with."""
    if not constant:
        return series
    return {name: [values[-1]] * len(values) for name, values in series.items()}


def _shades(items: list[Any], label: str = "$P_{{{}}}$") -> Iterator[Style]:
    """One style for each of a sequence, from light to dark, the last in black."""
    colours = mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, max(len(items) - 1, 1)))
    for i, item in enumerate(items):
        last = i == len(items) - 1
        yield Style(
            label.format(item),
            "#000000" if last else tuple(colours[i]),
            "solid" if last else _DASHES[i % len(_DASHES)],
            1.8 if last else 1.2,
        )
