"""How a pair of trajectories is measured: first what matters most, and everything stored when measured."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import rebasin
from experiments.harness.deadline import OutOfTime
from experiments.harness.experiment import Setup
from experiments.harness.methods import Matcher, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints, path_curves
from experiments.harness.record import (
    AlignedEpoch,
    EpochRecord,
    FixedPoints,
    Metrics,
    TrajectoryRecord,
    added,
)
from rebasin import permutation
from rebasin.barrier import BarrierCurve
from rebasin.permutation import Permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["TrajectoryMeasure"]

T = TypeVar("T")

# Steps of a measurement, for a deadline.
_ESSENTIALS = "the essentials of another epoch"
_READING = "reading another epoch"
_SWEEP = "the permutation of another epoch"

# How many epochs are read and matched ahead of the sweeps; two networks of each are in memory.
_AHEAD = 2


class _Epoch(NamedTuple):
    """One epoch of a pair: its networks, the match of each method, and the seconds that matching took."""

    params_a: Any
    params_b: Any
    matches: Mapping[str, rebasin.MatchResult]
    seconds: float

    @property
    def permutations(self) -> dict[str, Permutation]:
        """The permutation of each method."""
        return {name: match.permutation for name, match in self.matches.items()}


def _match_epoch(
    pair: Pair, trained: Sequence[Trajectory], matchers: Mapping[str, Matcher], epoch: int
) -> _Epoch:
    """Read both networks of an epoch and match them by every method."""
    params_a, params_b = (trajectory[epoch] for trajectory in trained)
    began = time.perf_counter()
    matches = {name: match(params_a, params_b, key=pair.key) for name, match in matchers.items()}
    return _Epoch(params_a, params_b, matches, time.perf_counter() - began)


@contextlib.contextmanager
def _ahead(function: Callable[[int], T], epochs: Sequence[int]) -> Iterator[Iterator[T]]:
    """Yield ``function(epoch)`` for each epoch, while a thread is at work on those that follow."""
    pool = ThreadPoolExecutor(1)

    def results() -> Iterator[T]:
        waiting: collections.deque[Future[T]] = collections.deque()
        for epoch in epochs:
            waiting.append(pool.submit(function, epoch))
            if len(waiting) > _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)


class TrajectoryMeasure:
    """Measures pairs of trajectories, what matters first.

    First come the essentials of every epoch t: the unaligned path, P_end and P_t, and P_t at the end; the
    last epoch before all others, as P_end is found there. Only then are the permutations of the match epochs
    applied at all epochs. A thread reads and matches ahead of the sweeps.
    """

    def __init__(self, setup: Setup[Any]) -> None:
        self._setup = setup
        self._matchers = build_matchers(setup, setup.config.methods)
        self._meter = PathMeter(
            setup.metrics_fn,
            setup.dataset,
            num_alphas=setup.config.num_alphas,
            num_eval=setup.config.num_eval,
        )

    def __call__(
        self, pair: Pair, trained: list[Trajectory], begun: TrajectoryRecord[float] | None
    ) -> Iterator[TrajectoryRecord[float]]:
        """Yield the record of a pair after each epoch whose essentials, or other permutations, it lacks."""
        record = begun or TrajectoryRecord(pair.seeds)
        measure = _PairMeasure(self._setup, self._matchers, self._meter, pair, trained)
        for grown in measure.essentials(record):
            record = grown
            yield record
        yield from measure.others(record)


class _PairMeasure:
    """Measures one pair; permutations and unaligned paths of the essentials are kept for what follows."""

    def __init__(
        self,
        setup: Setup[Any],
        matchers: Mapping[str, Matcher],
        meter: PathMeter,
        pair: Pair,
        trained: Sequence[Trajectory],
    ) -> None:
        self._setup, self._config, self._meter = setup, setup.config, meter
        self._pair, self._trained = pair, trained
        self._match = functools.partial(_match_epoch, pair, trained, matchers)
        self._last = self._config.epochs[-1]
        self._permutations: dict[int, dict[str, Permutation]] = {}
        self._unaligned: dict[int, BarrierCurve] = {}

    def essentials(self, record: TrajectoryRecord[float]) -> Iterator[TrajectoryRecord[float]]:
        """Yield the record after the essentials of each epoch that it lacks."""
        done = [part.epoch for part in record.epochs]
        missing = [t for t in self._config.epochs if t not in done]
        if not missing:
            return
        order = [self._last, *(t for t in missing if t != self._last)]
        end, reporter = None, self._setup.reporter
        with (
            _ahead(self._match, order) as epochs,
            reporter.stage(f"measure {self._pair}", len(missing)) as advance,
        ):
            for t in order:
                with self._setup.deadline.step(_ESSENTIALS):
                    epoch = self._take(next(epochs), t)
                    with self._setup.seconds.count("barriers"):
                        here = Paths(self._meter, self._setup.spec, epoch.params_a, epoch.params_b)
                        end = end or here
                        self._unaligned[t] = here.unaligned
                        if t in missing:
                            record = added(record, self._measure_epoch(epoch, t, here, end))
                if t in missing:
                    yield record
                    advance()

    def _take(self, epoch: _Epoch, t: int) -> _Epoch:
        """Keep the permutations of an epoch."""
        self._setup.seconds.add("matching", epoch.seconds)
        self._permutations[t] = epoch.permutations
        return epoch

    def _measure_epoch(self, epoch: _Epoch, t: int, here: Paths, end: Paths) -> EpochRecord[float]:
        """Measure the essentials of epoch t.

        Args:
          epoch: networks and matches of the epoch.
          t: number of the epoch.
          here: paths of the epoch.
          end: paths of the last epoch.
        """
        return EpochRecord(
            epoch=t,
            endpoints=endpoints(here.unaligned),
            unaligned=barriers(here.unaligned),
            distance=here.distance(),
            methods={
                name: self._measure_method(name, match, t, here, end) for name, match in epoch.matches.items()
            },
            path=path_curves(here.unaligned) if here is end else None,
        )

    def _measure_method(
        self, name: str, match: rebasin.MatchResult, t: int, here: Paths, end: Paths
    ) -> AlignedEpoch[float]:
        """Measure what one method makes of an epoch: under its own match, and under that of the end."""
        p_t, p_end = match.permutation, self._permutations[self._last][name]
        under = {self._last: here.barriers(p_end)}
        same_epoch = here.barriers(p_t)
        return AlignedEpoch(
            objective=float(match.objective[-1]),
            same_epoch=same_epoch,
            at_end=end.barriers(p_t),
            under={t: same_epoch, **under} if t in self._config.match_epochs else under,
            distance_same_epoch=here.distance(p_t),
            distance_end=here.distance(p_end),
            fixed_points=_agreement(rebasin.fixed_points(p_t, p_end)),
            identity=_agreement(rebasin.fixed_points(p_end)) if here is end else None,
            path=path_curves(here.curve(p_end)) if here is end else None,
        )

    def others(self, record: TrajectoryRecord[float]) -> Iterator[TrajectoryRecord[float]]:
        """Yield the record after each epoch at which permutations of other epochs were measured."""
        sources = [s for s in self._config.match_epochs if s != self._last]
        own = {part.epoch: part for part in record.epochs}
        if self._lacking(own[self._last]):
            # Networks of the last epoch under P_s: measured with the essentials of epoch s.
            record = added(record, self._with_under(own[self._last], {s: _at_end(own[s]) for s in sources}))
            yield record
        missing = [t for t in self._config.epochs if self._lacking(own[t]) and t != self._last]
        if not missing:
            return
        wanted = [s for s in (self._last, *sources) if s not in self._permutations]
        with _ahead(self._match, wanted) as epochs:
            for s in wanted:
                with self._setup.deadline.step(_READING):
                    self._take(next(epochs), s)
        title, reporter = f"other permutations, {self._pair}", self._setup.reporter
        with _ahead(self._read, missing) as networks, reporter.stage(title, len(missing)) as advance:
            for t in missing:
                part = own[t]
                try:
                    with self._setup.deadline.step(_READING):
                        here = self._paths_again(part, *next(networks))
                    for s in self._lacking(part):
                        with self._setup.deadline.step(_SWEEP), self._setup.seconds.count("barriers"):
                            found = {name: here.barriers(p) for name, p in self._permutations[s].items()}
                        part = self._with_under(part, {s: found})
                except OutOfTime:
                    yield added(record, part)
                    raise
                record = added(record, part)
                yield record
                advance()

    def _read(self, epoch: int) -> tuple[Any, Any]:
        """Return both networks of an epoch."""
        params_a, params_b = (trajectory[epoch] for trajectory in self._trained)
        return params_a, params_b

    def _paths_again(self, part: EpochRecord[float], params_a: Any, params_b: Any) -> Paths:
        """Return the paths of an epoch whose essentials are measured; equal permutations are swept once."""
        unaligned = self._unaligned.pop(part.epoch, None)
        here = Paths(self._meter, self._setup.spec, params_a, params_b, unaligned)
        for name, own in part.methods.items():
            here.remember(self._permutations[self._last][name], own.under[self._last])
            if part.epoch in self._permutations:
                here.remember(self._permutations[part.epoch][name], own.same_epoch)
        return here

    def _lacking(self, part: EpochRecord[float]) -> list[int]:
        """Return the match epochs whose permutations are not measured at an epoch."""
        return [
            s for s in self._config.match_epochs if any(s not in own.under for own in part.methods.values())
        ]

    def _with_under(
        self, part: EpochRecord[float], found: Mapping[int, Mapping[str, Metrics[float]]]
    ) -> EpochRecord[float]:
        """Return the record of an epoch with barriers under further permutations."""
        methods = {}
        for name, own in part.methods.items():
            under = {**own.under, **{s: by_method[name] for s, by_method in found.items()}}
            ordered = {s: under[s] for s in self._config.match_epochs if s in under}
            methods[name] = dataclasses.replace(own, under=ordered)
        return dataclasses.replace(part, methods=methods)


def _at_end(part: EpochRecord[float]) -> dict[str, Metrics[float]]:
    """Return the barriers at the last epoch under the permutations of an epoch."""
    return {name: own.at_end for name, own in part.methods.items()}


def _agreement(points: permutation.FixedPoints) -> FixedPoints[float]:
    return FixedPoints(points.total, points.fractions)
