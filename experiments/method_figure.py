"""The figure of `compare_methods`, drawn from ``results.json`` alone."""

import pathlib

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from experiments.figures import RC
from experiments.results import Results

__all__ = ["draw_methods"]

# With and without REPAIR: colour, marker and its filling differ, so that grey tells them apart as well.
_VARIANTS = {
    "plain": ("as it is", "#0072B2", "o", "#0072B2", -0.14),
    "repaired": ("with REPAIR", "#D55E00", "s", "white", 0.14),
}


def draw_methods(results: Results, path: pathlib.Path) -> None:
    """Error and loss barriers by method: means with the standard deviation, and every pair of networks.

    Args:
      results: finished results of ``compare_methods``.
      path: the PNG to write.
    """
    names = list(results.summary["methods"])
    recipe, count = results.config["recipe"], len(results.curves)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 0.32 * len(names) + 1.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, measure, scale, label in zip(
            panels,
            ("error_barrier", "loss_barrier"),
            (100, 1),
            ("error barrier on test data (%)", "loss barrier on test data (nats)"),
            strict=True,
        ):
            for variant, (title, colour, marker, face, shift) in _VARIANTS.items():
                y = np.arange(len(names)) + shift
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
                for curve in results.curves if count > 1 else ():
                    dots = [scale * curve["methods"][name][variant][measure] for name in names]
                    axes.plot(dots, y, linestyle="none", marker="|", color=colour, markersize=4, alpha=0.6)
            axes.set(xlabel=label)
            axes.set_xlim(left=0)
            axes.grid(axis="x", alpha=0.25, linewidth=0.5)
        panels[0].set_yticks(range(len(names)), labels=[name.replace("_", " ") for name in names])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        figure.suptitle(
            f"{recipe['model']} (width {recipe['width']}) on {recipe['dataset']}: "
            f"{count} pair{'s' * (count > 1)} of networks, mean, standard deviation and each pair",
            fontsize=9,
        )
        figure.savefig(path, metadata={"Software": None})
