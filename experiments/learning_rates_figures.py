"""The figure of ``learning_rates``, drawn from ``results.json`` alone."""

from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.harness.figures import GROUND, RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.results import Results

__all__ = ["draw_rates"]

_STYLES = {
    "none": GROUND._replace(marker="."),
    "weights": Style("weights", "#0072B2", marker="o"),
    "covariance": Style("covariance", "#D55E00", (0, (5, 2)), marker="s"),
    "activations": Style("activations", "#009E73", (0, (5, 1, 1, 1)), marker="^"),
}

# Measure, its scale and the label of its axis.
_PANELS = (
    ("midpoint_loss", 1, "test loss half way, at α = ½ (nats)"),
    ("error_barrier", 100, "test error barrier (%)"),
)


def draw_rates(results: Results, target: Target) -> None:
    """Loss at the midpoint and error barrier against the learning rate; bands are standard deviations.

    Args:
      results: finished results of ``learning_rates``.
      target: the PNG to write.
    """
    rates, methods = results.summary["rates"], results.summary["methods"]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 3.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, (measure, scale, label) in zip(panels, _PANELS, strict=True):
            for name, style in _STYLES.items():
                draw_band(axes, rates, _columns(methods[name][measure]), style, scale)
            axes.set(xscale="log", xlabel="peak learning rate", ylabel=label)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.25, linewidth=0.5)
        epochs = results.config["recipe"]["epochs"]
        note = f" at each rate, {epochs} epochs; bands: ± standard deviation"
        entitle(figure, results, "networks", note)
        share_legend(figure, panels[:1])
        figure.savefig(target, metadata={"Software": None})


def _columns(intervals: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """A list of intervals as lists of their fields."""
    return {name: [interval[name] for interval in intervals] for name in ("mean", "deviation")}
