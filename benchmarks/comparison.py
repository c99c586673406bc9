"""Every method on the same problems, in alternation, and what comes of it."""

import dataclasses
import itertools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import rebasin
from benchmarks.fresh_process import run_fresh
from benchmarks.methods import METHODS, OURS, PEER, Found
from benchmarks.problems import Problem
from benchmarks.timing import rotated
from rebasin.trees import is_weight, leaf_table

__all__ = ["TIE", "UNALIGNED", "Outcome", "Run", "Tally", "compare", "count_runs", "tally"]

UNALIGNED = "none"

# Objectives are computed in float64 of float32 weights: closer than this, relative, two are equal.
TIE = 1e-7


@dataclasses.dataclass(frozen=True)
class Run:
    """One matching of one pair.

    Attributes:
      pair: which networks.
      key: seed of the matching.
      method: a name in `METHODS`, or `UNALIGNED` for the identity.
      objective: ⟨A, P[B]⟩ over all weights, in float64.
      seconds: warm.
      sweeps: passes over all groups.
      solves: linear assignments.
      loss_barrier: on test data, nats.
      error_barrier: on test data, a fraction.
    """

    pair: str
    key: int
    method: str
    objective: float
    seconds: float = 0.0
    sweeps: int = 0
    solves: int = 0
    loss_barrier: float | None = None
    error_barrier: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All runs on one problem.

    Attributes:
      model: architecture and width.
      weights: where the weights come from.
      parameters: number of weights of one network.
      runs: every matching.
      first: seconds of first calls by method, in the order of the pairs.
    """

    model: str
    weights: str
    parameters: int
    runs: list[Run]
    first: dict[str, list[float]]

    def median(self, method: str, field: str) -> float:
        """Median of a field of `Run` over all runs of a method."""
        return float(np.median([getattr(run, field) for run in self.runs if run.method == method]))

    def by_pair(self, method: str, field: str) -> list[float]:
        """Mean over keys of a field, one number for each pair of networks; empty if not measured."""
        runs = [run for run in self.runs if run.method == method and getattr(run, field) is not None]
        return [
            float(np.mean([getattr(run, field) for run in runs if run.pair == pair]))
            for pair in dict.fromkeys(run.pair for run in runs)
        ]


class Tally(NamedTuple):
    """A method's objective against the peer's, on the same pair with the same key.

    Attributes:
      higher: how often it is higher.
      equal: how often they are equal up to `TIE`.
      lower: every case in which it is lower, as ``(its run, the peer's run)``.
    """

    higher: int
    equal: int
    lower: list[tuple[Run, Run]]


def tally(outcome: Outcome, method: str) -> Tally:
    """Counts a method's objectives against the peer's."""
    peers = {(run.pair, run.key): run for run in outcome.runs if run.method == PEER}
    higher, equal, lower = 0, 0, []
    for run in (run for run in outcome.runs if run.method == method):
        peer = peers[run.pair, run.key]
        if abs(run.objective - peer.objective) <= TIE * abs(peer.objective):
            equal += 1
        elif run.objective > peer.objective:
            higher += 1
        else:
            lower.append((run, peer))
    return Tally(higher, equal, lower)


def count_runs(problem: Problem, *, first_calls: int) -> int:
    """How often `compare` calls `advance`."""
    return len(METHODS) * (len(problem.pairs) * problem.keys) + 2 * first_calls


def compare(problem: Problem, *, first_calls: int, advance: Callable[[], None]) -> Outcome:
    """Runs every method on every pair and key, and measures barriers where there is a task.

    Times are warm, after a call of each method on the first pair that does not count. Methods take turns at
    going first, so that a machine that slows down does so for all of them.

    Args:
      problem: the networks.
      first_calls: how many first calls of ours and of the peer are timed, each in a process of its own.
      advance: is called after each run.

    Returns:
      All runs.
    """
    runs: list[Run] = []
    sweep = problem.build_sweep() if problem.build_sweep else None
    turns = itertools.count()
    for i, pair in enumerate(problem.pairs):
        a, b = jax.block_until_ready(jax.device_put(pair.load()))
        judge = _Judge(problem.spec, a, b, sweep)
        runs.append(Run(pair.name, 0, UNALIGNED, **judge(None)))
        if i == 0:
            _time_each(problem.spec, a, b, key=0, turn=0)
        for key in range(i * problem.keys, (i + 1) * problem.keys):
            for name, (seconds, found) in _time_each(problem.spec, a, b, key=key, turn=next(turns)).items():
                counts = {"sweeps": found.sweeps, "solves": found.solves}
                runs.append(Run(pair.name, key, name, seconds=seconds, **counts, **judge(found.permutation)))
                advance()
    first = _first_calls(problem, first_calls, advance)
    return Outcome(problem.model, problem.weights, problem.parameters, runs, first)


def _time_each(
    spec: rebasin.PermutationSpec, a: Any, b: Any, *, key: int, turn: int
) -> dict[str, tuple[float, Found]]:
    """Seconds and result of every method, one right after the other."""
    results = {}
    for name in rotated(METHODS, turn):
        began = time.perf_counter()
        found = METHODS[name](spec, a, b, key=jax.random.key(key))
        results[name] = (time.perf_counter() - began, found)
    return results


def _first_calls(problem: Problem, count: int, advance: Callable[[], None]) -> dict[str, list[float]]:
    """Seconds of first calls of ours and of the peer, in turns."""
    seconds: dict[str, list[float]] = {OURS: [], PEER: []}
    for turn in range(count):
        trees = jax.device_get(problem.pairs[turn % len(problem.pairs)].load())
        for name in rotated(seconds, turn):
            seconds[name].append(run_fresh("benchmarks.methods:first_call", name, problem.spec, *trees, turn))
            advance()
    return seconds


class _Judge:
    """Objective and barriers of a permutation, computed the same way for all methods, once for each."""

    def __init__(
        self, spec: rebasin.PermutationSpec, a: Any, b: Any, sweep: Callable[..., Any] | None
    ) -> None:
        self.spec, self.a, self.b, self.sweep = spec, a, b, sweep
        self.known: dict[bytes, dict[str, Any]] = {}

    def __call__(self, permutation: Any) -> dict[str, Any]:
        """Fields of `Run`; `None` is the identity."""
        if permutation is None:
            permutation = rebasin.identity_permutation(self.spec, self.a)
        name = b"".join(np.asarray(permutation[g], np.int32).tobytes() for g in self.spec.groups)
        if name not in self.known:
            self.known[name] = self._measure(rebasin.permute(self.spec, permutation, self.b))
        return self.known[name]

    def _measure(self, moved: Any) -> dict[str, Any]:
        values = {"objective": _inner_product(self.a, moved)}
        if self.sweep is not None:
            curve = self.sweep(self.a, moved)
            values |= {"loss_barrier": curve.loss_barrier.value, "error_barrier": curve.error_barrier.value}
        return values


def _inner_product(a: Any, b: Any) -> float:
    """⟨A, B⟩ over all weights, in float64."""
    a, b = leaf_table(a), leaf_table(b)
    return float(sum(np.sum(np.multiply(a[p], b[p], dtype=np.float64)) for p in a if is_weight(p, a[p])))
