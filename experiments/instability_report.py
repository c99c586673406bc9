"""The summary, the claims, the tidy rows and the printed tables of a run of ``sgd_instability``."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.harness.console import Reporter, cell
from experiments.harness.paths import METRICS
from experiments.harness.results import Claim, Results, claim, describe_mean
from experiments.harness.statistics import interval_at, mean_onset, summarise

__all__ = ["judge", "report", "summarise_curves", "tidy_rows"]

# By how much the barrier of children may exceed that of their parents and count as equally low.
_MARGIN = 0.02

# Names of methods that are longer than the eight characters of a column.
_SHORT = {"activations": "activ.", "covariance": "covar."}

# Methods whose columns fit side by side.
_ABREAST = 2


def summarise_curves(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates, and the onset with its range."""
    measured = [{k: v for k, v in curve.items() if k not in ("seeds", "epochs")} for curve in curves]
    series = [curve["siblings"]["test_error"] for curve in curves]
    found = mean_onset(config["epochs"], series, config["onset_at_most"])
    return {"epochs": config["epochs"], "onset": found._asdict(), **summarise(measured)}


def judge(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> list[Claim]:
    """The claims of section 5.1 about children, on test error barriers, by rules set before the runs."""
    epochs, limit = config["epochs"], config["onset_at_most"]
    siblings = np.array([curve["siblings"]["test_error"] for curve in curves])
    found = mean_onset(epochs, siblings.tolist(), limit)
    exists = math.isfinite(found.mean_curve)
    claims = [
        claim(
            "unstable_at_first",
            f"siblings that part at epoch {epochs[0]} end with a test error barrier above {limit:.0%}",
            "this recipe makes networks that are unstable at initialisation (appendix D)",
            siblings[:, 0],
            siblings[:, 0].mean() > limit,
        ),
        Claim(
            "onset_of_linear_connectivity",
            f"siblings have a mean barrier of at most {limit:.0%} from some spawn epoch on (measured: that "
            "epoch, interpolated in log(1 + t); in brackets the range of the replicates' own)",
            # JSON has no infinity: no onset is NaN here and null there.
            paper="around epoch 5 of 150 (section 5.1)",
            measured=found.mean_curve if exists else math.nan,
            low=found.low if math.isfinite(found.low) else math.nan,
            high=found.high if math.isfinite(found.high) else math.nan,
            holds=exists,
        ),
    ]
    stable = [i for i, t in enumerate(epochs) if t >= found.mean_curve] or [len(epochs) - 1]
    for method in config["methods"]:
        children = np.array([curve["children"][method]["test_error"] for curve in curves])
        parents = np.array([curve["parents"][method]["test_error"] for curve in curves])
        excess = children - parents[:, None]
        worst = max(stable, key=lambda i: excess[:, i].mean())
        late = claim(
            f"parents_permutation_aligns_children_{method}",
            f"{method}: averaged over spawn epochs from the onset on ({epochs[stable[0]]} to {epochs[-1]}), "
            f"the barrier of children under the parents' P_end exceeds the parents' own by at most "
            f"{_MARGIN:.0%}: the 95 % interval of the difference ends below that (highest at epoch "
            f"{epochs[worst]}: {excess[:, worst].mean():.1%})",
            "P_end aligns the children throughout from the onset on (section 5.1, figure 1 right)",
            excess[:, stable].mean(axis=1),
        )
        # One replicate has no interval.
        upper = late.high if len(curves) > 1 else late.measured
        claims += [
            dataclasses.replace(late, holds=exists and upper < _MARGIN),
            claim(
                f"parents_permutation_fails_before_{method}",
                f"{method}: children that part at epoch {epochs[0]} have a higher barrier under P_end than "
                "their parents: the 95 % interval of the difference is above 0",
                "P_end aligns children from the onset on; it is not claimed before (section 5.1)",
                excess[:, 0],
            ),
        ]
    return claims


def tidy_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each replicate, kind of pair, method, epoch and metric.

    ``parents`` have no spawn epoch; ``at_end`` are the parents under the permutation from an epoch.
    """
    for replicate, curve in enumerate(results.curves):
        kinds: dict[tuple[str, str], Any] = {
            ("siblings", "none"): curve["siblings"],
            ("children", "none"): curve["unaligned"],
            **{("children", method): series for method, series in curve["children"].items()},
            **{("at_end", method): series for method, series in curve["at_end"].items()},
        }
        parents = {name: values for name, values in curve["parents"].items() if name != "endpoints"}
        for metric in METRICS:
            for name, values in parents.items():
                method = "none" if name == "unaligned" else name
                yield _row(replicate, "parents", method, "", metric, values[metric])
            for (kind, method), series in kinds.items():
                for epoch, value in zip(curve["epochs"], series[metric], strict=True):
                    yield _row(replicate, kind, method, epoch, metric, value)


def _row(replicate: int, pair: str, method: str, epoch: Any, metric: str, value: float) -> dict[str, Any]:
    return {
        "replicate": replicate,
        "pair": pair,
        "method": method,
        "epoch": epoch,
        "metric": metric,
        "barrier": f"{value:.6g}",
    }


def report(results: Results, reporter: Reporter) -> None:
    """Prints a table of spawn epochs for each two methods, the barriers of the parents, and the onset."""
    methods = results.config["methods"]
    reporter.say("\nBarriers at the end, test data, of children that part at epoch t (errors in %);")
    reporter.say(describe_mean(results, "parents"))
    for first in range(0, len(methods), _ABREAST):
        _table(results.summary, methods[first : first + _ABREAST], reporter)
    reporter.say("A¹–A²: siblings; A¹–P[B¹]: children of both parents under the parents' P_end;")
    reporter.say("P_t@end: the parents at the end under their permutation from t")
    parents = results.summary["parents"]
    known = [f"{name} {cell(parents[name]['test_error'], percent=True)}" for name in ("unaligned", *methods)]
    reporter.wrap(f"parents under P_end, test error: {', '.join(known)}")
    reporter.say(f"onset of linear connectivity: epoch {_onset_text(results.summary['onset'])}")


def _table(summary: Mapping[str, Any], methods: Sequence[str], reporter: Reporter) -> None:
    columns = {"A¹–A²\n\nloss": summary["siblings"], "A¹–A²\n\nerror": summary["siblings"]}
    for method in methods:
        children, short = summary["children"][method], _SHORT.get(method, method.split("_")[0])[:8]
        columns |= {f"{short}\nA¹–P[B¹]\n{name}": children for name in ("loss", "error")}
        columns[f"{short}\nP_t@end\nerror"] = summary["at_end"][method]
    rows = [[str(epoch)] for epoch in summary["epochs"]]
    for header, series in columns.items():
        metric = header.rpartition("\n")[2]
        for i, row in enumerate(rows):
            row.append(cell(interval_at(series[f"test_{metric}"], i), percent=metric == "error"))
    reporter.table(["\n\nt", *columns], rows)


def _onset_text(found: Mapping[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "none" if value is None or not math.isfinite(value) else f"{value:.1f}"

    low, high = number(found["low"]), number(found["high"])
    return f"{number(found['mean_curve'])} of the mean, {low} to {high} over replicates"
