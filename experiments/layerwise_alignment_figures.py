"""Figures, table and tidy rows of ``layerwise_alignment``, made from ``results.json`` alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
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
from experiments.harness.matched_epochs import LayerwiseRecord
from experiments.harness.record import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_errors", "draw_fixed_points", "draw_losses", "report", "tidy_rows"]

# What a finished run holds; its config is a `LayerwiseConfig`.
_Finished = Results[Any, LayerwiseRecord[float], LayerwiseRecord[Interval]]

# The variants in the order of the figures, with what is rewound at a split k.
_VARIANTS = {
    "bottom_up": r"bottom-up: layers 1 to $k$",
    "top_down": r"top-down: layers after $k$",
    "put_in": r"put-in: layer $k$",
    "leave_out": r"leave-out: all but $k$",
}
_DASHES = ("solid", (0, (5, 1.5)), (0, (3, 1, 1, 1)), (0, (1, 0.8)), (0, (6, 1, 1, 1, 1, 1)), (0, (2, 1)))

# How many splits or layers are drawn at most.
_MANY = 6


def draw_losses(results: _Finished, target: Target) -> None:
    """Draw loss barriers at the end by rewind epoch: figures 5 right and 17.

    Rows of train and test data for each matching method, columns as in the paper, a line for each split k.
    """
    _draw(results, target, ("train_loss", "test_loss"))


def draw_errors(results: _Finished, target: Target) -> None:
    """Draw error barriers, as `draw_losses`: figure 18."""
    _draw(results, target, ("train_error", "test_error"))


def _draw(results: _Finished, target: Target, metrics: Sequence[str]) -> None:
    config = results.config
    rows = [(method, metric) for method in config.methods for metric in metrics]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(11.2, 1.2 + 2.1 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), len(_VARIANTS), squeeze=False, sharey="row")
        for row, (method, metric) in zip(panels, rows, strict=True):
            for axes, (variant, title) in zip(row, _VARIANTS.items(), strict=True):
                _draw_panel(axes, results, method, metric, variant)
                axes.set_title(title, loc="left", fontsize=8)
            name = f"{method}: " if len(config.methods) > 1 else ""
            row[0].set_ylabel(name + METRIC_LABELS[metric][1])
        # Only now: a limit that is set stops the axis from growing with the panels that share it.
        for axes in panels.flat:
            dress_epochs(axes, config.epochs)
        kind = "partly rewound networks" if config.partial == "networks" else "$P_t$ and $P_{\\mathrm{end}}$"
        entitle(figure, results, "networks", f"$A$ and $P[B]$ at the end, $P$ from {kind}; means over pairs")
        share_legend(figure, [panels[0][0]], columns=9)
        figure.savefig(target, metadata={"Software": None})


def _draw_panel(axes: Axes, results: _Finished, method: str, metric: str, variant: str) -> None:
    """Draw one variant by rewind epoch, with P_t and P_end as baselines."""
    config, summary = results.config, results.require_summary()
    scale = METRIC_LABELS[metric][0]
    own = [part.methods[method] for part in summary.epochs]
    alone = [scale * getattr(match.alone, metric).mean for match in own]
    axes.plot(config.epochs, alone, color="#000000", linestyle=(0, (1, 1)), linewidth=1.8, label="$P_t$")
    end = scale * getattr(summary.end[method].aligned, metric).mean
    axes.axhline(end, color=GROUND.colour, linestyle=GROUND.dashes, label=r"$P_{\mathrm{end}}$")
    splits = _some(len(summary.layers), first=1)
    for style, k in zip(_styles(len(splits)), splits, strict=True):
        # Bands of so many lines would cover each other.
        mean = [scale * getattr(match.variants[variant][k], metric).mean for match in own]
        axes.plot(
            config.epochs,
            mean,
            color=style.colour,
            linestyle=style.dashes,
            linewidth=style.width,
            label=f"$k={k}$",
            marker=".",
            markersize=4,
        )
    axes.set_xlabel("rewind epoch $t$")


def _some(count: int, *, first: int = 0) -> list[int]:
    """Return all numbers from `first` to `count`, or some of them, evenly spaced, if these are many."""
    return np.unique(np.linspace(first, count, min(count + 1 - first, _MANY)).round().astype(int)).tolist()


def _styles(count: int) -> Iterator[Style]:
    """Yield styles from light to dark."""
    for i, colour in enumerate(mpl.colormaps["viridis_r"](np.linspace(0.15, 0.95, count))):
        yield Style("", tuple(colour), _DASHES[i % len(_DASHES)], 1.4)


def draw_fixed_points(results: _Finished, target: Target) -> None:
    """Draw how far P_t and P_end agree, in all and by layer: figure 21.

    One row for each matching method; dotted lines are the agreement of P_end with the identity.
    """
    config, summary = results.config, results.require_summary()
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.6, 0.9 + 2.5 * len(config.methods)), layout="constrained")
        panels = figure.subplots(len(config.methods), 2, squeeze=False, sharey=True)
        for (total, by_layer), method in zip(panels, config.methods, strict=True):
            own = [part.methods[method].fixed_points for part in summary.epochs]
            draw_band(total, config.epochs, [p.total for p in own], Style("all units", "#000000"), 100)
            drawn = _some(len(summary.layers) - 1)
            for style, i in zip(_styles(len(drawn)), drawn, strict=True):
                series = [p.groups[summary.layers[i]] for p in own]
                label = f"{i + 1}: {_short(summary.layers[i])}"
                if len(summary.layers) > _MANY:  # the bands of many layers would cover each other
                    series = [interval._replace(deviation=np.nan) for interval in series]
                draw_band(by_layer, config.epochs, series, style._replace(label=label), 100)
            base = 100 * summary.end[method].identity.total.mean
            for axes in (total, by_layer):
                axes.axhline(base, color=GROUND.colour, linestyle=GROUND.dashes, label="identity")
                dress_epochs(axes, config.epochs)
                axes.set_ylim(0, 103)
                axes.set_xlabel("epoch $t$ of the permutation")
                axes.legend(fontsize=7)
            total.set_ylabel(r"placed as by $P_{\mathrm{end}}$ (%)")
            total.set_title(f"matching of {method}", loc="left")
            by_layer.set_title("by layer", loc="left")
        entitle(figure, results, "networks", r"fixed points of $P_t$ and $P_{\mathrm{end}}$; bands: ± sd")
        figure.savefig(target, metadata={"Software": None})


def _short(group: str) -> str:
    return group.removeprefix("params/").removesuffix("/kernel")


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, method, rewind epoch, variant, split and metric."""
    for replicate, record in enumerate(results.records):
        for part in record.epochs:
            for method, own in part.methods.items():
                for variant, series in own.variants.items():
                    for k, found in enumerate(series):
                        for metric in METRICS:
                            yield {
                                "replicate": replicate,
                                "method": method,
                                "epoch": part.epoch,
                                "variant": variant,
                                "k": k,
                                "metric": metric,
                                "barrier": f"{getattr(found, metric):.6g}",
                                "fixed_points": f"{own.fixed_points.total:.6g}",
                            }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of splits for each method and variant, and the fixed points by layer."""
    config, summary = results.config, results.require_summary()
    epochs = [part for part in summary.epochs if part.epoch != config.epochs[-1]]
    reporter.say("\nTest error barriers at the end, in %, while some layers are those of epoch t;")
    reporter.say(describe_mean(config.replicates))
    for method in config.methods:
        end = cell(summary.end[method].aligned.test_error, percent=True)
        reporter.say(f"\n{method}: {end} under P_end")
        rows = [["P_t", *(cell(p.methods[method].alone.test_error, percent=True) for p in epochs)]]
        for variant in _VARIANTS:
            for k in _some(len(summary.layers), first=1):
                found = [part.methods[method].variants[variant][k].test_error for part in epochs]
                name = f"{variant.replace('_', '-')} {k}"
                rows.append([name, *(cell(interval, percent=True) for interval in found)])
        reporter.table(["k", *(f"t={part.epoch}" for part in epochs)], rows)
        reporter.say("\nunits that P_t and P_end place alike, in %")
        rows = [
            ["all", *(cell(part.methods[method].fixed_points.total, percent=True) for part in epochs)],
            *(
                [
                    f"layer {i + 1}",
                    *(
                        cell(part.methods[method].fixed_points.groups[summary.layers[i]], percent=True)
                        for part in epochs
                    ),
                ]
                for i in _some(len(summary.layers) - 1)
            ),
        ]
        reporter.table(["", *(f"t={part.epoch}" for part in epochs)], rows)
        identity = cell(summary.end[method].identity.total, percent=True)
        reporter.say(f"that the identity and P_end place alike: {identity}")
