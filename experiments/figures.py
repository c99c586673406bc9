"""Figures, drawn from ``results.json`` alone."""

import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Results

__all__ = ["RC", "draw_trajectories"]

# Okabe and Ito's colours, which colour-blind readers can tell apart; the lines differ in dashes too.
_STYLES = {
    "unaligned": ("no permutation", "#777777", (0, (1, 1))),
    "end": (r"$P_{\mathrm{end}}$, from the last epoch", "#0072B2", "solid"),
    "same_epoch": (r"$P_t$, from that very epoch", "#D55E00", (0, (5, 2))),
    "at_end": (r"$P_t$, applied at the last epoch", "#009E73", (0, (5, 1, 1, 1))),
}

RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
    "savefig.dpi": 200,
}


def draw_trajectories(results: Results, path: pathlib.Path) -> None:
    """Barriers over training, as figures 1 left, 4 and 8 of arXiv 2404.06498.

    Left: error barrier of A_t and B_t at each epoch; middle: loss barrier; right: error barrier at the last
    epoch under permutations from each epoch. Thick lines are means over replicates on test data, thin ones
    the replicates, dots the mean on train data.

    Args:
      results: finished results of ``training_trajectories``.
      path: the PNG to write.
    """
    recipe = results.config["recipe"]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 3.0), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        for axes, metric, names, scale in (
            (left, "error", ("unaligned", "same_epoch", "end"), 100),
            (middle, "loss", ("unaligned", "same_epoch", "end"), 1),
            (right, "error", ("unaligned", "at_end"), 100),
        ):
            for name in names:
                flat = axes is right and name == "unaligned"
                _draw_series(axes, results, name, metric, scale, constant=flat)
            _dress(axes, results.summary["epochs"])
        left.set(title=r"networks at epoch $t$", ylabel="error barrier (%)", xlabel="epoch $t$")
        middle.set(title=r"networks at epoch $t$", ylabel="loss barrier (nats)", xlabel="epoch $t$")
        right.set(
            title="networks at the last epoch", ylabel="error barrier (%)", xlabel="epoch of the permutation"
        )
        lines = [line for axes in (left, right) for line in axes.get_legend_handles_labels()[0]]
        handles = {str(line.get_label()): line for line in lines}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
        count = len(results.curves)
        figure.suptitle(
            f"{recipe['model']} (width {recipe['width']}) on {recipe['dataset']}, {count} "
            f"pair{'s' * (count > 1)} of networks; lines: test data, dots: train data",
            fontsize=9,
        )
        figure.savefig(path, metadata={"Software": None})


def _draw_series(
    axes: Axes, results: Results, name: str, metric: str, scale: float, *, constant: bool
) -> None:
    """One alignment: mean over replicates on test data, the replicates themselves, mean on train data.

    A `constant` series is its value at the last epoch, drawn as a level to compare with.
    """
    label, colour, dashes = _STYLES[name]
    epochs = np.array(results.summary["epochs"])

    def values(split: str, series: list[float]) -> np.ndarray:
        array = scale * np.array(series)
        return np.full_like(array, array[-1]) if constant else array

    for curve in results.curves if len(results.curves) > 1 else ():
        thin = values("test", curve["barriers"][name][f"test_{metric}"])
        axes.plot(epochs, thin, color=colour, linewidth=0.5, alpha=0.5)
    mean = results.summary["barriers"][name]
    axes.plot(
        epochs,
        values("test", mean[f"test_{metric}"]["mean"]),
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        label=label,
    )
    train: Any = values("train", mean[f"train_{metric}"]["mean"])
    axes.plot(epochs, train, color=colour, linestyle="none", marker=".", markersize=3)


def _dress(axes: Axes, epochs: list[int]) -> None:
    """Log-spaced epochs, as in the paper, with epoch 0 on the axis; barriers start at 0."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [t for t in (0, 1, 2, 5, 10, 20, 50, 100, 150) if epochs[0] <= t <= epochs[-1]]
    axes.set_xticks(sorted({*ticks, epochs[-1]}), labels=[str(t) for t in sorted({*ticks, epochs[-1]})])
    axes.minorticks_off()
    axes.set_xlim(epochs[0] - 0.1, epochs[-1] * 1.05)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.5)
