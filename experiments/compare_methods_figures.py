"""The figure of `compare_methods`, drawn from ``results.json`` alone."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.figures import RC, Target, entitle, share_legend
from experiments.harness.results import Results

__all__ = ["draw_methods"]

# Colour, marker and its filling differ, so that grey tells them apart as well.
_VARIANTS = {
    "plain": ("as it is", "#0072B2", "o", "#0072B2"),
    "repaired": ("with REPAIR", "#D55E00", "s", "white"),
    "reset": ("with new norm statistics", "#009E73", "^", "#009E73"),
}
_GAP = 0.28

# Measure, its scale, label, where the axis begins to be logarithmic, and ticks.
_PANELS = (
    ("error_barrier", 100, "error barrier on test data (%)", 1, (0, 1, 3, 10, 30, 100)),
    ("loss_barrier", 1, "loss barrier on test data (nats)", 0.01, (0, 0.01, 0.1, 1, 10)),
)


def draw_methods(results: Results, target: Target) -> None:
    """Error and loss barriers by method: means with the standard deviation, and every pair of networks.

    Args:
      results: finished results of ``compare_methods``.
      target: the PNG to write.
    """
    names = list(results.summary["methods"])
    variants = [variant for variant in _VARIANTS if variant in results.summary["methods"][names[0]]]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 0.32 * len(names) + 1.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, (measure, scale, label, linear, ticks) in zip(panels, _PANELS, strict=True):
            for i, variant in enumerate(variants):
                title, colour, marker, face = _VARIANTS[variant]
                y = np.arange(len(names)) + _GAP * (i - (len(variants) - 1) / 2)
                summaries = [results.summary["methods"][name][variant][measure] for name in names]
                axes.errorbar(
                    [scale * s["mean"] for s in summaries],
                    y,
                    xerr=[scale * (s["deviation"] or 0) for s in summaries],
                    fmt=marker,
                    color=colour,
                    markerfacecolor=face,
                    markersize=5,
                    linewidth=1,
                    label=title,
                )
                for curve in results.curves if len(results.curves) > 1 else ():
                    dots = [scale * curve["methods"][name][variant][measure] for name in names]
                    axes.plot(dots, y, linestyle="none", marker="|", color=colour, markersize=4, alpha=0.6)
            values = [
                scale * curve["methods"][name][variant][measure]
                for curve in results.curves
                for name in names
                for variant in variants
            ]
            _dress(axes, label, min(values), max(values), linear, ticks)
        panels[0].set_yticks(range(len(names)), labels=[name.replace("_", " ") for name in names])
        panels[0].invert_yaxis()
        entitle(figure, results, "networks", ": mean, standard deviation and each pair")
        share_legend(figure, panels[:1], columns=len(variants))
        figure.savefig(target, metadata={"Software": None})


def _dress(
    axes: Axes, label: str, lowest: float, highest: float, linear: float, ticks: Sequence[float]
) -> None:
    """A logarithmic axis: aligned pairs have less than a hundredth of the barrier of those that are not."""
    axes.set(xlabel=label)
    axes.set_xscale("symlog", linthresh=linear, linscale=0.6)
    axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    # From 0 on only where something is close to it.
    left = 0.9 * max(tick for tick in ticks if tick <= lowest / 1.5)
    axes.set_xlim(left or -0.05 * linear, max(1.3 * highest, 2 * linear))
    axes.grid(axis="x", alpha=0.25, linewidth=0.5)
