"""The figure of ``sgd_instability``, drawn from ``results.json`` alone."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import (
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

__all__ = ["draw_instability"]

_SIBLINGS = Style(r"siblings $A^1$ and $A^2$", "#CC79A7", (0, (5, 1, 1, 1)))
_CHILDREN = Style(r"children $A^1$ and $P_{\mathrm{end}}[B^1]$", "#7F3B08", (0, (5, 2)), 1.8)
_AT_END = Style(r"parents under $P_t$", "#009E73", "solid", 1.0)
_PARENTS = Style(r"parents $A$ and $P_{\mathrm{end}}[B]$", "#555555", (0, (1, 1)))


def draw_instability(results: Results, target: Target) -> None:
    """Barriers at the end of training by spawn epoch: figure 1 right, figures 8 and 9 column 3.

    One row for each matching method; columns test error, train error, test loss. Lines are means over
    replicates, bands one standard deviation. The shaded epochs are the range of the replicates' onsets, the
    thin upright line the onset of the mean. Barriers under P_t of the first epochs may run out of it.
    """
    summary = results.summary
    with mpl.rc_context(RC):
        rows = len(summary["children"])
        figure = Figure(figsize=(9.6, 0.9 + 2.2 * rows), layout="constrained")
        panels = figure.subplots(rows, 3, squeeze=False, sharey="col")
        for row, method in zip(panels, summary["children"], strict=True):
            for axes, metric in zip(row, ("test_error", "train_error", "test_loss"), strict=True):
                _draw_panel(axes, summary, method, metric)
                dress_epochs(axes, summary["epochs"])
                axes.set_ylim(0, _top(summary, metric))
            row[0].set_title(f"matching of {method}", loc="left")
        epochs, limit = results.config["recipe"]["epochs"], results.config["onset_at_most"]
        note = f"bands: ± standard deviation; upright: onset of test error barriers ≤ {limit:.0%}"
        entitle(figure, results, "parents", f", after {epochs} epochs; {note}")
        share_legend(figure, list(panels[0]))
        figure.savefig(target, metadata={"Software": None})


def _top(summary: dict[str, Any], metric: str) -> float:
    """Upper end of the axis of barriers, for all methods: P_t of the first epochs may run beyond it.

    It would otherwise press the lines that the figure is about to the ground.
    """

    def highest(curves: Iterable[Mapping[str, Any]]) -> float:
        """Upper edge of the highest band."""
        found = [curve[metric] for curve in curves]
        return max(
            float(np.max(np.asarray(x["mean"]) + np.nan_to_num(np.asarray(x["deviation"], float))))
            for x in found
        )

    shown = [summary["siblings"], *summary["children"].values()]
    shown += [summary["parents"][method] for method in summary["children"]]
    top = min(2 * highest(shown), 1.05 * highest([*shown, *summary["at_end"].values()]))
    return METRIC_LABELS[metric][0] * top + 1e-3


def _draw_panel(axes: Axes, summary: dict[str, Any], method: str, metric: str) -> None:
    epochs, (scale, label) = summary["epochs"], METRIC_LABELS[metric]
    level = {name: [value] * len(epochs) for name, value in summary["parents"][method][metric].items()}
    draw_band(axes, epochs, summary["siblings"][metric], _SIBLINGS, scale)
    draw_band(axes, epochs, summary["at_end"][method][metric], _AT_END, scale)
    draw_band(axes, epochs, level, _PARENTS, scale)
    draw_band(axes, epochs, summary["children"][method][metric], _CHILDREN, scale)
    found = summary["onset"]
    # A replicate without onset is null in the file: the range goes on to the edge then.
    low, high = (
        epochs[-1] if value is None or not math.isfinite(value) else value
        for value in (found["low"], found["high"])
    )
    axes.axvspan(low, high, color="#000000", alpha=0.07, linewidth=0)
    if found["mean_curve"] is not None and math.isfinite(found["mean_curve"]):
        axes.axvline(found["mean_curve"], color="#000000", linewidth=0.7)
    axes.set(ylabel=label, xlabel="epoch $t$ at which children part")
