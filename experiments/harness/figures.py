"""What all figures share: the style, a mean with its band, the axis of epochs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.results import PartialResults, Results, count_pairs
from experiments.harness.statistics import Interval

__all__ = [
    "GROUND",
    "METRIC_LABELS",
    "RC",
    "Style",
    "Target",
    "draw_band",
    "dress_epochs",
    "dress_widths",
    "entitle",
    "share_legend",
]

RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "savefig.dpi": 150,
}

# What a figure is written to: a path, or a file object in tests.
Target = Any

# Scale and axis label of each metric.
METRIC_LABELS = {
    "test_error": (100, "test error barrier (%)"),
    "train_error": (100, "train error barrier (%)"),
    "test_loss": (1, "test loss barrier (nats)"),
    "train_loss": (1, "train loss barrier (nats)"),
}


class Style(NamedTuple):
    """The look of a line.

    Lines of one panel differ in dashes and brightness as well as in colour, so that a grey print tells them
    apart.

    Attributes:
      label: text in the legend.
      colour: any colour that Matplotlib knows.
      dashes: line style.
      width: line width in points.
      marker: marker at each point; `None` for none.
    """

    label: str
    colour: Any
    dashes: Any = "solid"
    width: float = 1.6
    marker: str | None = None


# Okabe and Ito's colours, which colour-blind readers can tell apart.
GROUND = Style("no permutation", "#777777", (0, (1, 1)))


def draw_band(
    axes: Axes,
    x: Sequence[float],
    series: Sequence[Interval],
    style: Style,
    scale: float = 1,
    *,
    signed: bool = False,
) -> None:
    """Draw a mean over replicates with a band of one standard deviation to either side.

    Args:
      axes: where to draw.
      x: abscissae, ``[n]``.
      series: intervals over replicates, ``[n]``; no band is drawn where a deviation is NaN.
      style: look of the line.
      scale: factor on all values.
      signed: whether values may be negative. Otherwise no band falls below 0.
    """
    mean = scale * np.array([interval.mean for interval in series])
    spread = scale * np.array([interval.deviation for interval in series])
    axes.plot(
        x,
        mean,
        color=style.colour,
        linestyle=style.dashes,
        linewidth=style.width,
        label=style.label,
        marker=style.marker,
        markersize=3,
    )
    if np.isfinite(spread).all():
        low = np.maximum(mean - spread, 0) if (mean >= 0).all() and not signed else mean - spread
        axes.fill_between(x, low, mean + spread, color=style.colour, alpha=0.18, linewidth=0)


def dress_epochs(axes: Axes, epochs: Sequence[int], *, bottom: float | None = 0) -> None:
    """Give axes log-spaced epochs, as in the paper, with epoch 0; barriers start at `bottom`."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    last = epochs[-1]
    # Numbers so close to the last one that both would overlap are left out.
    ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100) if epochs[0] <= t and (t + 1) * 1.3 <= last + 1]
    axes.set_xticks([*ticks, last], labels=[str(t) for t in (*ticks, last)])
    axes.minorticks_off()
    axes.set_xlim(epochs[0] - 0.1, last * 1.05)
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    axes.grid(alpha=0.25, linewidth=0.5)


def dress_widths(axes: Axes, widths: Sequence[int]) -> None:
    """Give axes a logarithmic scale of widths, each of them a tick."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(widths), labels=[str(width) for width in widths])
    axes.minorticks_off()
    axes.set_xlabel("width")
    axes.grid(alpha=0.25, linewidth=0.5)


def entitle(figure: Figure, results: Results[Any, Any, Any], what: str, note: str) -> None:
    """Head a figure with the model, the dataset, the number of pairs of `what`, the algorithm, and a note."""
    config = results.config
    title = f"{config.described}, {count_pairs(config.replicates, what, unit=config.unit)}"
    # A note of its own line, since one line would be wider than the figure.
    unfinished = ", unfinished" if isinstance(results, PartialResults) else ""
    figure.suptitle(f"{title}, algorithm {config.algorithm}{unfinished}\n{note}", fontsize=9)


def share_legend(figure: Figure, panels: Sequence[Axes], *, columns: int = 4) -> None:
    """Put one legend below all panels, with every label once."""
    lines = [line for axes in panels for line in axes.get_legend_handles_labels()[0]]
    handles = {str(line.get_label()): line for line in lines}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
