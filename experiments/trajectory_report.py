"""The summary, the tidy rows and the printed tables of a run of ``training_trajectories``."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from experiments.harness.console import Reporter, cell
from experiments.harness.paths import METRICS
from experiments.harness.results import Results, describe_mean
from experiments.harness.statistics import interval_at, summarise

__all__ = ["report", "summarise_curves", "tidy_rows"]


def summarise_curves(config: Mapping[str, Any], curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates of all that was measured."""
    measured = [{key: value for key, value in curve.items() if key != "seeds"} for curve in curves]
    return {"epochs": config["epochs"], "match_epochs": config["match_epochs"], **summarise(measured)}


def tidy_rows(results: Results) -> Iterator[dict[str, Any]]:
    """One row for each replicate, method, permutation, epoch and metric.

    ``match_epoch`` is the epoch of the permutation, empty where there is none, and ``epoch`` that of the
    networks it was applied to.
    """
    epochs, matched = results.config["epochs"], results.config["match_epochs"]

    def row(replicate: int, method: str, source: Any, at: int, metric: str, barrier: float) -> dict[str, Any]:
        sides = results.curves[replicate]["endpoints"][metric]
        i = epochs.index(at)
        return {
            "replicate": replicate,
            "method": method,
            "match_epoch": source,
            "epoch": at,
            "metric": metric,
            "barrier": f"{barrier:.6g}",
            "endpoint_a": f"{sides['a'][i]:.6g}",
            "endpoint_b": f"{sides['b'][i]:.6g}",
        }

    for replicate, curve in enumerate(results.curves):
        for metric in METRICS:
            for t, value in zip(epochs, curve["unaligned"][metric], strict=True):
                yield row(replicate, "none", "", t, metric, value)
            for method, record in curve["methods"].items():
                seen = set()
                for s, values in zip(matched, record["fixed"][metric], strict=True):
                    for t, value in zip(epochs, values, strict=True):
                        seen.add((s, t))
                        yield row(replicate, method, s, t, metric, value)
                # Those that are not among them already: P_t at t and at the end.
                for i, t in enumerate(epochs):
                    for at, name in ((t, "same_epoch"), (epochs[-1], "at_end")):
                        if (t, at) not in seen:
                            seen.add((t, at))
                            value = record["barriers"][name][metric][i]
                            yield row(replicate, method, t, at, metric, value)


def report(results: Results, reporter: Reporter) -> None:
    """Prints a table for each method."""
    reporter.say(f"\n{describe_mean(results)}, test data; errors in %")
    for method in results.config["methods"]:
        _table(results, method, reporter)
    reporter.say("\nnone: as trained; P_end: permutation from the last epoch; P_t: from that epoch;")
    reporter.say("P_t@end: P_t applied at the last epoch; L2: distance of A_t to P_t[B_t] in % of")
    reporter.say("that to P_end[B_t]; same: units that P_t and P_end place alike, in %")


def _table(results: Results, method: str, reporter: Reporter) -> None:
    summary = results.summary
    own = summary["methods"][method]
    barriers = {"none": summary["unaligned"], **own["barriers"]}
    rows = []
    for i, epoch in enumerate(summary["epochs"]):
        ends = [100 * summary["endpoints"]["test_error"][side]["mean"][i] for side in "ab"]
        distances = [own["distance"][name]["mean"][i] for name in ("same_epoch", "end")]
        rows.append(
            [
                str(epoch),
                "{:.1f}/{:.1f}".format(*ends),
                *(
                    cell(interval_at(barriers[n]["test_loss"], i), percent=False)
                    for n in ("end", "same_epoch")
                ),
                *(
                    cell(interval_at(barriers[n]["test_error"], i), percent=True)
                    for n in ("none", "end", "same_epoch", "at_end")
                ),
                f"{100 * distances[0] / distances[1]:.0f}",
                f"{100 * own['fixed_points']['total']['mean'][i]:.0f}",
            ]
        )
    reporter.say(f"\nmatching of {method}: test error of A and B, then loss and error barriers")
    losses, errors = ["P_end", "P_t"], ["none", "P_end", "P_t", "P_t@end"]
    header = ["\nt", "error\nA/B", *(f"loss\n{n}" for n in losses), *(f"error\n{n}" for n in errors)]
    reporter.table([*header, "\nL2", "\nsame"], rows)
