"""Two trajectories, all their permutations and all their segments, in one pass over the checkpoints."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import rebasin
from experiments.harness.console import Reporter
from experiments.harness.matchers import Matcher
from experiments.harness.paths import METRICS, Meter, Segments, barriers, endpoints, means
from experiments.harness.results import Results
from rebasin.spec import PermutationSpec
from rebasin.training.trajectory import Trajectory

__all__ = ["PairAnalysis"]


class _Epoch:
    """One epoch of a pair: its networks, and the match of each method."""

    def __init__(self, pair: list[Trajectory], matchers: Mapping[str, Matcher], epoch: int) -> None:
        self.a, self.b = (trajectory[epoch] for trajectory in pair)
        began = time.perf_counter()
        self.matches = {name: match(self.a, self.b) for name, match in matchers.items()}
        self.seconds = time.perf_counter() - began


class PairAnalysis:
    """Everything that is measured on one pair of trajectories.

    Each checkpoint is read once. A thread reads and matches ahead of the sweeps, the epochs whose
    permutations are wanted everywhere first, and networks are let go when their epoch is measured.
    """

    def __init__(
        self,
        epochs: Sequence[int],
        match_epochs: Sequence[int],
        spec: PermutationSpec,
        matchers: Mapping[str, Matcher],
        meter: Meter,
        results: Results,
    ) -> None:
        self.epochs, self.match_epochs, self.last = epochs, match_epochs, epochs[-1]
        self.spec, self.matchers = spec, matchers
        self.meter, self.results = meter, results

    def measure(self, pair: list[Trajectory], reporter: Reporter, title: str) -> dict[str, Any]:
        """The record of a pair, by epoch."""
        wanted = self.match_epochs
        rest = [t for t in self.epochs if t not in wanted]
        order = [self.last, *(s for s in wanted if s != self.last), *rest]
        at_epoch: dict[int, dict[str, Any]] = {}
        with ThreadPoolExecutor(1) as pool, reporter.stage(title, len(order)) as advance:
            futures = {t: pool.submit(_Epoch, pair, self.matchers, t) for t in order}
            try:
                # Every epoch needs the permutations of these.
                sources = {s: futures[s].result().matches for s in wanted}
                end = self._segments(futures[self.last].result())
                for epoch in order:
                    at_epoch[epoch] = self._measure_epoch(self._take(futures, epoch), epoch, sources, end)
                    advance()
            finally:
                pool.shutdown(cancel_futures=True)
        return self._assemble([at_epoch[t] for t in self.epochs])

    def _take(self, futures: dict[int, Future[_Epoch]], epoch: int) -> _Epoch:
        """The epoch, which nothing else holds from now on."""
        found = futures.pop(epoch).result()
        self.results.add_seconds("matching", found.seconds)
        return found

    def _segments(self, epoch: _Epoch) -> Segments:
        return Segments(self.meter, self.spec, epoch.a, epoch.b)

    def _measure_epoch(
        self, epoch: _Epoch, t: int, sources: Mapping[int, Mapping[str, rebasin.MatchResult]], end: Segments
    ) -> dict[str, Any]:
        """All that is recorded of one epoch, in the structure of the record."""
        began = time.perf_counter()
        here = end if t == self.last else self._segments(epoch)
        record: dict[str, Any] = {
            "endpoints": endpoints(here.unaligned),
            "unaligned": barriers(here.unaligned),
            "distance": here.distance(None),
            "methods": {},
        }
        for name, match in epoch.matches.items():
            p_end = sources[self.last][name].permutation
            own = match.permutation
            agreement = rebasin.fixed_points(own, p_end)
            record["methods"][name] = {
                "same_epoch": barriers(here.curve(own)),
                "at_end": barriers(end.curve(own)),
                "fixed": [barriers(here.curve(sources[s][name].permutation)) for s in self.match_epochs],
                "distance": {"same_epoch": here.distance(own), "end": here.distance(p_end)},
                "objective": float(match.objective[-1]),
                "fixed_points": {"total": agreement.total, "groups": agreement.fractions},
            }
            if here is end:
                identity = rebasin.fixed_points(p_end)
                record["methods"][name]["identity"] = {
                    "total": identity.total,
                    "groups": identity.fractions,
                }
                record["methods"][name]["segment"] = means(here.curve(p_end))
        if here is end:
            record["segment"] = means(here.unaligned)
        self.results.add_seconds("barriers", time.perf_counter() - began)
        return record

    def _assemble(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The record of a pair, series over epochs, from those of its epochs."""
        last = rows[-1]
        sides = {m: {s: [row["endpoints"][m][s] for row in rows] for s in "ab"} for m in METRICS}
        return {
            "endpoints": sides,
            "unaligned": _series(rows, lambda row: row["unaligned"]),
            "distance": [row["distance"] for row in rows],
            "segment": last["segment"],
            "methods": {name: self._assemble_method(rows, name) for name in self.matchers},
        }

    def _assemble_method(self, rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
        own = [row["methods"][name] for row in rows]
        at = [s for s, _ in enumerate(self.match_epochs)]
        groups = own[-1]["fixed_points"]["groups"]
        return {
            "barriers": {
                "end": _series(own, lambda row: row["fixed"][-1]),
                "same_epoch": _series(own, lambda row: row["same_epoch"]),
                "at_end": _series(own, lambda row: row["at_end"]),
            },
            # [match epoch][epoch] for each metric.
            "fixed": {m: [[row["fixed"][s][m] for row in own] for s in at] for m in METRICS},
            "distance": {key: [row["distance"][key] for row in own] for key in ("same_epoch", "end")},
            "objective": [row["objective"] for row in own],
            "fixed_points": {
                "total": [row["fixed_points"]["total"] for row in own],
                "groups": {g: [row["fixed_points"]["groups"][g] for row in own] for g in groups},
                "identity": own[-1]["identity"],
            },
            "segment": own[-1]["segment"],
        }


def _series(rows: list[Any], pick: Callable[[Any], Mapping[str, float]]) -> dict[str, list[float]]:
    """Each metric over epochs."""
    return {metric: [pick(row)[metric] for row in rows] for metric in METRICS}
