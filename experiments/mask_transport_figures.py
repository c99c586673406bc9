"""Figure, table and tidy rows of ``mask_transport``, made from ``results.json`` alone."""

from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from experiments.harness.console import Reporter, cell
from experiments.harness.figures import GROUND, RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.pruning import TransportLevel, TransportRecord
from experiments.harness.record import METRICS, Metrics
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval

__all__ = ["draw_transport", "report", "tidy_rows"]

# What a finished run holds; its config is a `TransportConfig`.
_Finished = Results[Any, TransportRecord[float], TransportRecord[Interval]]

# What B is trained with, in the order of files and figures: fields of `TransportLevel`, then of
# `TransportedMask`.
_OF_LEVEL = {
    "ticket_a": Style(r"$A$ with its own mask", "#999999", (0, (5, 1, 1, 1)), 0.8),
    "random": Style("random mask", "#000000", (0, (1, 2)), 1.0),
    "control": GROUND._replace(label=r"control, $B$ with $m_A$"),
    "baseline": Style(r"baseline, one-shot pruning of $B$", "#E69F00", (0, (3, 1, 1, 1))),
    "gold_standard": Style(r"gold standard, $B$ with its own mask", "#009E73", (0, (5, 2))),
}
_OF_METHOD = {
    "previous_work": Style(r"previous work, $P^{(i)}[B]$ with $m_A$", "#D55E00", "solid", 1.2),
    "transported": Style(r"transported, $P[B]$ with $m_A$", "#0072B2", "solid", 1.8),
}


def _picked(level: TransportLevel[Any], name: str, method: str) -> Metrics[Any]:
    return getattr(level if name in _OF_LEVEL else level.methods[method], name)


def draw_transport(results: _Finished, target: Target) -> None:
    """Draw test and train accuracy by the fraction of weights that remain: figures 2 right and 13.

    One row for each matching method. Lines are means over replicates, bands one standard deviation. The
    horizontal line is the accuracy of the dense networks, from which a network is matching. Lines of
    masks that fail leave the panels.
    """
    config, levels = results.config, results.require_summary().levels
    remaining = [level.density.mean for level in levels]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(8.0, 1.2 + 2.4 * len(config.methods)), layout="constrained")
        panels = figure.subplots(len(config.methods), 2, squeeze=False, sharey="col")
        for row, method in zip(panels, config.methods, strict=True):
            for axes, metric in zip(row, ("test_error", "train_error"), strict=True):
                dense = [getattr(_picked(levels[0], name, method), metric).mean for name in _DENSE]
                axes.axhline(100 * (1 - sum(dense) / 2), color="#000000", linewidth=0.7)
                for name, style in (_OF_LEVEL | _OF_METHOD).items():
                    errors = [getattr(_picked(level, name, method), metric) for level in levels]
                    draw_band(axes, remaining, [_accuracy(error) for error in errors], style, 100)
                axes.set_ylim(*_accuracy_range(levels, method, metric))
                split = metric.partition("_")[0]
                axes.set(xscale="log", xlabel="fraction of weights", ylabel=f"{split} accuracy (%)")
                ticks = [t for t in (1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005) if t >= 0.8 * min(remaining)]
                axes.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
                axes.set_xlim(1.05, min(remaining) / 1.05)  # sparser to the right, as in the paper
                axes.grid(alpha=0.25, linewidth=0.5)
            row[0].set_title(f"matching of {method}", loc="left")
        entitle(figure, results, "networks", config.figure_note)
        share_legend(figure, list(panels[0]), columns=3)
        figure.savefig(target, metadata={"Software": None})


def _accuracy_range(
    levels: Sequence[TransportLevel[Interval]], method: str, metric: str
) -> tuple[float, float]:
    """Return the range of accuracies in % of the masks that iterative pruning found, twice as large.

    Where other masks fail they fall far below, so that a range of all lines would show nothing of these.
    """
    names = ("ticket_a", "gold_standard", *_OF_METHOD)
    errors = [getattr(_picked(level, name, method), metric).mean for level in levels for name in names]
    best, worst = min(errors), max(errors)
    span = max(worst - best, 0.005)
    return 100 * max(0.0, 1 - worst - 0.8 * span), 100 * min(1 + 0.05 * span, 1 - best + 0.2 * span)


# At level 0 these are the dense networks A and B.
_DENSE = ("ticket_a", "gold_standard")


def _accuracy(error: Interval) -> Interval:
    return Interval(1 - error.mean, 1 - error.high, 1 - error.low, error.deviation)


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, level, mask, method and metric."""
    for replicate, record in enumerate(results.records):
        for level in record.levels:
            masks = [(name, "none") for name in _OF_LEVEL]
            masks += [(name, method) for method in level.methods for name in _OF_METHOD]
            for name, method in masks:
                for metric in METRICS:
                    yield {
                        "replicate": replicate,
                        "level": level.level,
                        "density": f"{level.density:.6g}",
                        "mask": name,
                        "method": method,
                        "metric": metric,
                        "value": f"{getattr(_picked(level, name, method), metric):.6g}",
                    }


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table of test errors by level for each method."""
    levels = results.require_summary().levels
    short = {"gold_standard": "gold", "transported": "transp.", "previous_work": "prev."}
    short |= {"baseline": "one-shot", "control": "control", "random": "random"}
    reporter.say("\nTest error by level of pruning, in %, of B rewound and trained with each mask;")
    reporter.say(describe_mean(results.config.replicates))
    for method in results.config.methods:
        rows = [
            [
                str(level.level),
                f"{level.density.mean:.1%}",
                *(cell(_picked(level, name, method).test_error, percent=True) for name in short),
            ]
            for level in levels
        ]
        reporter.say(f"\n{method}")
        reporter.table(["i", "left", *short.values()], rows)
    reporter.wrap(
        "gold: B's own mask; transp.: the mask of A⁽ⁱ⁾ on P[B]; prev.: on P⁽ⁱ⁾[B]; control: on B; random: "
        "shuffled within leaves"
    )
