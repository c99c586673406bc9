"""Figures, tables and tidy rows of ``training_trajectories``, made from ``results.json`` alone."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
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
from experiments.harness.record import METRICS, AlignedEpoch, EpochRecord, Metrics, TrajectoryRecord
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import Interval, ratio

__all__ = ["draw_fixed_permutations", "draw_permutations", "draw_trajectories", "report", "tidy_rows"]

# What a finished run holds; its config is a `TrajectoryConfig`.
_Finished = Results[Any, TrajectoryRecord[float], TrajectoryRecord[Interval]]

_STYLES = {
    "end": Style(r"$P_{\mathrm{end}}$, from the last epoch", "#0072B2"),
    "same_epoch": Style(r"$P_t$, from that very epoch", "#D55E00", (0, (5, 2))),
    "at_end": Style(r"$P_t$, applied at the last epoch", "#009E73", (0, (5, 1, 1, 1))),
}
_DASHES = ("solid", (0, (4, 1.5)), (0, (5, 1, 1, 1)), (0, (1, 1)), (0, (3, 1, 1, 1, 1, 1)))

# With more layers than this a panel has no bands, and names only some of its lines.
_FEW = 6


def draw_trajectories(results: _Finished, target: Target) -> None:
    """Draw barriers over training, as figures 1 left, 4, 8 (columns 1 and 3), 9 and 15 (left and right).

    One row for each matching method. Left: error barrier of A_t and B_t at each epoch; middle: loss barrier;
    right: error barrier at the last epoch under permutations from each epoch. Lines are means on test data,
    bands one standard deviation over replicates, dots the mean on train data.
    """
    epochs = results.config.epochs
    with mpl.rc_context(RC):
        figure, panels = _canvas(
            results, columns=3, note="lines: test data (bands: ± standard deviation), dots: train data"
        )
        for row, method in zip(panels, results.config.methods, strict=True):
            for axes, metric, names in (
                (row[0], "error", ("none", "same_epoch", "end")),
                (row[1], "loss", ("none", "same_epoch", "end")),
                (row[2], "error", ("none", "at_end")),
            ):
                scale, label = METRIC_LABELS[f"test_{metric}"]
                for name in names:
                    series = _barriers(results.require_summary(), method, name)
                    if axes is row[2] and name == "none":
                        # All permutations are compared with the networks of the last epoch.
                        series = [series[-1]] * len(series)
                    style = _STYLES.get(name, GROUND)
                    draw_band(axes, epochs, _of(series, f"test_{metric}"), style, scale)
                    train = [scale * interval.mean for interval in _of(series, f"train_{metric}")]
                    axes.plot(epochs, train, color=style.colour, linestyle="none", marker=".", markersize=3)
                dress_epochs(axes, epochs)
                axes.set(ylabel=label, xlabel="epoch $t$ of the networks")
            row[0].set_title(f"matching of {method}", loc="left")
            row[1].set_title(r"$A_t$ and $P[B_t]$", loc="left")
            row[2].set_title("networks at the last epoch", loc="left")
            row[2].set_xlabel("epoch $t$ of the permutation")
        share_legend(figure, list(panels[0]))
        figure.savefig(target, metadata={"Software": None})


def draw_fixed_permutations(results: _Finished, target: Target) -> None:
    """Draw barriers under permutations from chosen epochs: figures 7, 8 (column 2), 10, 15 (middle).

    One row for each matching method; columns as figure 10: test error, train error, test loss, train loss.
    """
    epochs, matched = results.config.epochs, results.config.match_epochs
    summary = results.require_summary()
    with mpl.rc_context(RC):
        figure, panels = _canvas(
            results, columns=4, note=r"$A_t$ and $P_s[B_t]$, bands: ± standard deviation"
        )
        for row, method in zip(panels, results.config.methods, strict=True):
            for axes, metric in zip(row, METRIC_LABELS, strict=True):
                scale, label = METRIC_LABELS[metric]
                draw_band(axes, epochs, _of(_barriers(summary, method, "none"), metric), GROUND, scale)
                for style, s in zip(_shades(matched), matched, strict=True):
                    # Of an unfinished run, some permutations are measured at some epochs alone.
                    under = {e.epoch: e.methods[method].under for e in summary.epochs}
                    at = [t for t in epochs if s in under[t]]
                    draw_band(axes, at, _of([under[t][s] for t in at], metric), style, scale)
                dress_epochs(axes, epochs)
                axes.set(ylabel=label, xlabel="epoch $t$ of the networks")
            row[0].set_title(f"matching of {method}", loc="left")
        share_legend(figure, list(panels[0]), columns=min(len(matched) + 1, 10))
        figure.savefig(target, metadata={"Software": None})


def draw_permutations(results: _Finished, target: Target) -> None:
    """Draw distances and fixed points over training: appendix H.1 and figure 21.

    One row for each matching method. Left: distance of A_t to P[B_t]; middle: fraction of units that P_t and
    P_end place alike, dotted that of the identity; right: the same for each group, in order of depth.
    """
    with mpl.rc_context(RC):
        figure, panels = _canvas(results, columns=3, note="bands: ± standard deviation")
        for row, method in zip(panels, results.config.methods, strict=True):
            _draw_distances(row[0], results, method)
            _draw_fixed_points(row[1:], results, method)
        figure.savefig(target, metadata={"Software": None})


def _draw_distances(axes: Any, results: _Finished, method: str) -> None:
    """Draw the distance of A_t to B_t, P_end[B_t] and P_t[B_t] over training."""
    parts, epochs = results.require_summary().epochs, results.config.epochs
    draw_band(axes, epochs, [epoch.distance for epoch in parts], GROUND)
    own = [epoch.methods[method] for epoch in parts]
    draw_band(axes, epochs, [epoch.distance_end for epoch in own], _STYLES["end"])
    draw_band(axes, epochs, [epoch.distance_same_epoch for epoch in own], _STYLES["same_epoch"])
    axes.set(ylabel=r"$\|A_t - P[B_t]\|_2$", xlabel="epoch $t$ of the networks")
    axes.set_title(f"matching of {method}", loc="left")
    dress_epochs(axes, epochs, bottom=None)
    axes.legend(fontsize=7)


def _draw_fixed_points(panels: Sequence[Any], results: _Finished, method: str) -> None:
    """Draw the agreement of P_t with P_end, of all units in the first panel and by layer in the second."""
    epochs = results.config.epochs
    own = [epoch.methods[method] for epoch in results.require_summary().epochs]
    draw_band(panels[0], epochs, [epoch.fixed_points.total for epoch in own], Style("$P_t$", "#000000"), 100)
    if own[-1].identity is not None:
        base = 100 * own[-1].identity.total.mean
        panels[0].axhline(base, color=GROUND.colour, linestyle=GROUND.dashes, label="identity")
    groups = list(own[-1].fixed_points.groups)
    for style, group in zip(_shades(_layer_names(groups), "{}"), groups, strict=True):
        series = [epoch.fixed_points.groups[group] for epoch in own]
        if len(groups) > _FEW:
            # The bands of many layers would cover each other.
            series = [interval._replace(deviation=np.nan) for interval in series]
        draw_band(panels[1], epochs, series, style, 100)
    for axes, title in zip(panels, ("all units", "by layer"), strict=True):
        axes.legend(fontsize=7)
        axes.set(ylabel=r"placed as by $P_{\mathrm{end}}$ (%)", xlabel="epoch $t$ of the permutation")
        axes.set_title(title, loc="left")
        dress_epochs(axes, epochs)
        axes.set_ylim(0, 103)


def tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each replicate, method, permutation, epoch and metric.

    ``match_epoch`` is the epoch of the permutation, empty where there is none, and ``epoch`` the epoch of the
    networks that it was applied to.
    """
    for replicate, record in enumerate(results.records):
        epochs = {epoch.epoch: epoch for epoch in record.epochs}

        def row(
            method: str,
            source: int | str,
            at: int,
            metric: str,
            barriers: Metrics[float],
            replicate: int = replicate,
            epochs: dict[int, EpochRecord[float]] = epochs,
        ) -> dict[str, Any]:
            ends = epochs[at].endpoints
            return {
                "replicate": replicate,
                "method": method,
                "match_epoch": source,
                "epoch": at,
                "metric": metric,
                "barrier": f"{getattr(barriers, metric):.6g}",
                "endpoint_a": f"{getattr(ends.a, metric):.6g}",
                "endpoint_b": f"{getattr(ends.b, metric):.6g}",
            }

        for metric in METRICS:
            for t, epoch in epochs.items():
                yield row("none", "", t, metric, epoch.unaligned)
            for method in results.config.methods:
                for s, t, barriers in _permutations(record, method):
                    yield row(method, s, t, metric, barriers)


def _permutations(record: TrajectoryRecord[float], method: str) -> Iterator[tuple[int, int, Metrics[float]]]:
    """Yield ``(s, t, barriers under P_s at t)`` once for each s and t that were measured."""
    own = {epoch.epoch: epoch.methods[method] for epoch in record.epochs}
    last = record.epochs[-1].epoch
    seen = set()
    for s in own[last].under:
        for t in (t for t in own if s in own[t].under):
            seen.add((s, t))
            yield s, t, own[t].under[s]
    for t, epoch in own.items():
        for at, barriers in ((t, epoch.same_epoch), (last, epoch.at_end)):
            if (t, at) not in seen:
                seen.add((t, at))
                yield t, at, barriers


def report(results: _Finished, reporter: Reporter) -> None:
    """Print a table for each method."""
    reporter.say(f"\n{describe_mean(results.config.replicates)}, test data; errors in %")
    for method in results.config.methods:
        _print_table(results.require_summary(), method, reporter)
    reporter.say("\nnone: as trained; P_end: permutation from the last epoch; P_t: from that epoch;")
    reporter.say("P_t@end: P_t applied at the last epoch; L2: distance of A_t to P_t[B_t] in % of")
    reporter.say("that to P_end[B_t]; same: units that P_t and P_end place alike, in %")


def _print_table(summary: TrajectoryRecord[Interval], method: str, reporter: Reporter) -> None:
    barriers = {name: _barriers(summary, method, name) for name in ("none", *_STYLES)}
    rows = []
    for i, epoch in enumerate(summary.epochs):
        own, ends = epoch.methods[method], (epoch.endpoints.a, epoch.endpoints.b)
        rows.append(
            [
                str(epoch.epoch),
                "/".join(f"{100 * metrics.test_error.mean:.1f}" for metrics in ends),
                *(cell(barriers[n][i].test_loss, percent=False) for n in ("end", "same_epoch")),
                *(
                    cell(barriers[n][i].test_error, percent=True)
                    for n in ("none", "end", "same_epoch", "at_end")
                ),
                f"{100 * ratio(own.distance_same_epoch.mean, own.distance_end.mean):.0f}",
                f"{100 * own.fixed_points.total.mean:.0f}",
            ]
        )
    reporter.say(f"\nmatching of {method}: test error of A and B, then loss and error barriers")
    losses, errors = ["P_end", "P_t"], ["none", "P_end", "P_t", "P_t@end"]
    header = ["\nt", "error\nA/B", *(f"loss\n{n}" for n in losses), *(f"error\n{n}" for n in errors)]
    reporter.table([*header, "\nL2", "\nsame"], rows)


def _barriers(summary: TrajectoryRecord[Interval], method: str, name: str) -> list[Metrics[Interval]]:
    """Return barriers over training: ``none`` without a permutation, else a name of `_STYLES`."""
    last = summary.epochs[-1].epoch
    picks: dict[str, Callable[[AlignedEpoch[Interval]], Metrics[Interval]]] = {
        "end": lambda epoch: epoch.under[last],
        "same_epoch": lambda epoch: epoch.same_epoch,
        "at_end": lambda epoch: epoch.at_end,
    }
    if name == "none":
        return [epoch.unaligned for epoch in summary.epochs]
    return [picks[name](epoch.methods[method]) for epoch in summary.epochs]


def _of(series: Sequence[Metrics[Interval]], metric: str) -> list[Interval]:
    """Return one metric of a series."""
    return [getattr(metrics, metric) for metrics in series]


def _canvas(results: _Finished, *, columns: int, note: str) -> tuple[Figure, Any]:
    """Make a figure with one row for each method, and a heading that says what was measured."""
    rows = len(results.config.methods)
    figure = Figure(figsize=(3.2 * columns if columns < 4 else 11.2, 0.9 + 2.2 * rows), layout="constrained")
    # Methods are compared down a column, which therefore shares its axis.
    panels = figure.subplots(rows, columns, squeeze=False, sharey="col")
    entitle(figure, results, "networks", note)
    return figure, panels


def _layer_names(groups: list[str]) -> list[str]:
    """Return short names of groups; of many, all but five get an underscore, which hides them in a legend."""
    short = [group.removeprefix("params/").removesuffix("/kernel") for group in groups]
    named = set(np.linspace(0, len(groups) - 1, 5).round().astype(int).tolist())
    return [name if len(groups) <= _FEW or i in named else f"_{name}" for i, name in enumerate(short)]


def _shades(items: Sequence[Any], label: str = "$P_{{{}}}$") -> Iterator[Style]:
    """Yield one style for each item, from light to dark and the last in black."""
    colours = mpl.colormaps["viridis_r"](np.linspace(0.12, 0.95, max(len(items) - 1, 1)))
    for i, item in enumerate(items):
        last = i == len(items) - 1
        yield Style(
            label.format(item),
            "#000000" if last else tuple(colours[i]),
            "solid" if last else _DASHES[i % len(_DASHES)],
            1.8 if last else 1.2,
        )
