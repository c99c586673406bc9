"""Figures, tables and tidy rows of ``transitivity``, made from ``results.json`` alone."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure

from experiments.harness.connectivity import DefinitionRecord, NetworksRecord, NetworksSummary
from experiments.harness.console import Reporter
from experiments.harness.figures import (
    GROUND,
    METRIC_LABELS,
    RC,
    Style,
    Target,
    draw_band,
    dress_widths,
    entitle,
    share_legend,
)
from experiments.harness.record import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_simplices", "draw_transitivity", "report", "symmetric", "tidy_rows"]

# What a finished run holds; its config is a `TransitivityConfig`.
_Finished = Results[Any, NetworksRecord[float], NetworksSummary]

_STYLES = {
    "unaligned": GROUND,
    "tempered": Style("unaligned, temperature fitted", "#777777", (0, (3, 1, 1, 1)), 1.2),
    "weak": Style("weak", "#0072B2"),
    "simultaneous": Style("simultaneous", "#56B4E9"),
    "reference": Style("strong by reference", "#D55E00"),
    "merge_many": Style("strong by MergeMany", "#E69F00", (0, (5, 1, 1, 1))),
    "universe": Style("strong by universe", "#009E73", (0, (5, 1, 1, 1))),
    "all_pairs": Style("strong by loss of all pairs", "#CC79A7", "solid", 1.9),
    "entezari": Style("Entezari property", "black", (0, (1, 1)), 1.0),
}
# Activations are drawn solid and weights dashed; any further methods dotted.
_DASHES = {"activations": "solid", "weights": (0, (5, 2))}


def symmetric(config: Any) -> list[str]:
    """Return the definitions with one barrier for each pair, in the order of files and figures."""
    return [name for name in config.wanted_parts if name != "entezari"]


def _style(name: str) -> Style:
    what, _, method = name.partition(" ")
    style = _STYLES[what]
    if not method:
        return style
    return style._replace(label=f"{style.label}, {method}", dashes=_DASHES.get(method, (0, (1, 1))))


def _mean(found: DefinitionRecord[Interval], metric: str) -> Interval:
    """Return the mean over pairs of the barrier, with no spread."""
    mean = float(np.mean([getattr(pair, metric).mean for pair in found.cells]))
    return Interval(mean, math.nan, math.nan, math.nan)


def _highest(records: Sequence[NetworksRecord[float]], name: str, metric: str) -> list[float]:
    return [max(getattr(pair, metric) for pair in record.definitions[name].cells) for record in records]


def draw_transitivity(results: _Finished, target: Target) -> None:
    """Draw mean barriers, broken triplets and errors of averages.

    Top: mean barrier over pairs by width, in loss and in error. Bottom: fraction of triplets with A ~ B and
    B ~ C and not A ~ C by width, and error of the average of the first networks at the largest width.
    """
    config, summary = results.config, results.require_summary()
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 7.2), layout="constrained")
        panels = figure.subplots(2, 2)
        for axes, metric in zip(panels[0], ("test_loss", "test_error"), strict=True):
            scale, label = METRIC_LABELS[metric]
            for name in config.wanted_parts:
                series = [_mean(w.definitions[name], metric) for w in summary.widths]
                draw_band(axes, config.widths, series, _style(name)._replace(marker="."), scale)
            axes.set(ylabel=f"mean {label}", ylim=(0, None))
            dress_widths(axes, config.widths)
        shares = summary.transitivity["test_error"]
        for name in symmetric(config):
            series = [share.broken_of_triplets for share in shares[name]]
            means = [interval._replace(deviation=math.nan) for interval in series]
            draw_band(panels[1, 0], config.widths, means, _style(name)._replace(marker="."), 100)
        panels[1, 0].set(
            ylabel=f"triplets that are not transitive\nat {config.connected_at_most:.1%} of error (%)",
            ylim=(0, None),
        )
        dress_widths(panels[1, 0], config.widths)
        _draw_averages(panels[1, 1], config, summary.widths[-1])
        entitle(figure, results, f"{config.num_networks} networks", "lines: means")
        share_legend(figure, list(panels.flat), columns=4)
        figure.savefig(target, metadata={"Software": None})


def _draw_averages(axes: Axes, config: Any, widest: NetworksRecord[Interval]) -> None:
    counts = range(1, config.num_networks + 1)
    for name, found in widest.definitions.items():
        if found.averages:
            accuracy = [1 - average.test_error.mean for average in found.averages]
            means = [Interval(x, math.nan, math.nan, math.nan) for x in accuracy]
            draw_band(axes, counts, means, _style(name)._replace(marker="."), 100)
    axes.set(
        xlabel="networks averaged",
        ylabel=f"test accuracy of the average (%)\nat width {widest.width}",
        xticks=list(counts),
    )
    axes.grid(alpha=0.25, linewidth=0.5)


def draw_simplices(results: _Finished, target: Target) -> None:
    """Draw the test error on the simplex of the first three networks at the largest width.

    One triangle for each definition that gives every network one permutation. Its corners are the networks.
    """
    widest = results.require_summary().widths[-1]
    found = {name: d.simplex for name, d in widest.definitions.items() if d.simplex is not None}
    top = max(100 * x.mean for simplex in found.values() for x in simplex.error)
    levels = np.linspace(0, max(top, 1), 21)
    with mpl.rc_context(RC):
        figure = Figure(figsize=(9.6, 0.8 + 2.4 * math.ceil(len(found) / 4)), layout="constrained")
        panels = figure.subplots(math.ceil(len(found) / 4), min(4, len(found)), squeeze=False)
        for axes in panels.flat:
            axes.set_axis_off()
        for axes, (name, simplex) in zip(panels.flat, found.items(), strict=False):
            weights = np.array(simplex.weights)
            x, y = weights[:, 1] + weights[:, 2] / 2, math.sqrt(3) / 2 * weights[:, 2]
            error = [100 * value.mean for value in simplex.error]
            axes.tricontourf(x, y, error, levels=levels, cmap="viridis")
            for i, (left, up) in enumerate(((-0.06, -0.02), (1.06, -0.02), (0.6, 0.86))):
                axes.text(left, up, "ABC"[i], ha="center", va="center")
            axes.set_title(_style(name).label, fontsize=8)
            axes.set_aspect("equal")
        norm = BoundaryNorm(levels, 256)
        figure.colorbar(ScalarMappable(norm, "viridis"), ax=panels, label="test error (%)", shrink=0.8)
        title = f"{results.config.num_networks} networks"
        entitle(figure, results, title, f"test error of weighted averages at width {widest.width}, mean")
        figure.savefig(target, metadata={"Software": None})


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each width, replicate, definition, pair of networks and metric, then for averages."""
    k = results.config.num_networks
    for record in results.records:
        for name, found in record.definitions.items():
            ordered = name == "entezari"
            pairs = itertools.product(range(k), repeat=2) if ordered else itertools.combinations(range(k), 2)
            for (i, j), barriers in zip(pairs, found.cells, strict=True):
                for metric in METRICS:
                    yield _row(record, name, f"barrier {i} {j}", metric, getattr(barriers, metric))
            for count, average in enumerate(found.averages, 1):
                for metric in METRICS:
                    yield _row(record, name, f"average of {count}", metric, getattr(average, metric))
            if found.cycle_error is not None:
                yield _row(record, name, "cycles", "cycle_error", found.cycle_error)


def _row(
    record: NetworksRecord[float], definition: str, what: str, metric: str, value: float
) -> dict[str, Any]:
    return {
        "width": record.width,
        "seed": record.seeds[0],
        "definition": definition,
        "what": what,
        "metric": metric,
        "value": f"{value:.6g}",
    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print for each width a table of definitions."""
    config, summary = results.config, results.require_summary()
    mean = describe_mean(config.replicates, f"{config.num_networks} networks", unit=config.unit)
    for at, width in enumerate(config.widths):
        own = [record for record in results.records if record.width == width]
        reporter.say(f"\nwidth {width}, {mean}, test data")
        rows = []
        for name in config.wanted_parts:
            found = summary.widths[at].definitions[name]
            average = f"{100 * found.averages[-1].test_error.mean:.1f}" if found.averages else ""
            cycle = "" if found.cycle_error is None else f"{found.cycle_error.mean:.2f}"
            shares = summary.transitivity["test_error"].get(name)
            share, k = shares[at] if shares else None, config.num_networks
            rows.append(
                [
                    name,
                    f"{_mean(found, 'test_loss').mean:.2f}",
                    f"{np.mean(_highest(own, name, 'test_loss')):.2f}",
                    f"{100 * _mean(found, 'test_error').mean:.1f}",
                    f"{100 * np.mean(_highest(own, name, 'test_error')):.1f}",
                    f"{share.broken}/{share.chains}" if share else "",
                    f"{share.strong[k]}/{share.sets[k]}" if share else "",
                    average,
                    cycle,
                ]
            )
        top = ["", "loss\nmean", "loss\nhigh", "error\nmean", "error\nhigh"]
        reporter.table([*top, "chains\nbroken", "all\njoined", "error,\naverage", "cycle\nerror"], rows)
    reporter.wrap(
        "loss in nats, error in %: barriers of all pairs, their mean and the highest; chains broken: of the "
        f"triplets with A ~ B and B ~ C at an error barrier of {config.connected_at_most:.1%} those without "
        "A ~ C; all joined: of the sets of all networks that are connected weakly those that this "
        "definition connects; error, average: test error of the average of all networks."
    )
