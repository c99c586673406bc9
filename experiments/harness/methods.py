"""Matching methods in experiments: found by name, and compared on the same pair of networks."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax

import rebasin
from experiments.harness.algorithms import algorithm_options
from experiments.harness.experiment import Setup
from experiments.harness.networks import Pair
from experiments.harness.record import MatchRecord, Objective, TestPath
from rebasin.arithmetic import distance
from rebasin.barrier import BarrierCurve
from rebasin.matching.registry import as_method
from rebasin.training.data import normalise
from rebasin.training.trajectory import Trajectory

__all__ = [
    "BASELINE",
    "MEASURES",
    "PAPER_METHODS",
    "VARIANTS",
    "Matcher",
    "MethodComparison",
    "build_matchers",
    "check_methods",
]

# (params_a, params_b) -> the match; `key` may be given by name.
Matcher: TypeAlias = Callable[..., rebasin.MatchResult]

# The methods that arXiv 2404.06498 compares.
PAPER_METHODS = ("weights", "activations")

# The name under which a comparison has the pair as it was trained.
BASELINE = "none"

# The fields of `MatchRecord` that hold paths, and those fields of `TestPath` that are single numbers.
VARIANTS = ("plain", "repaired", "reset")
MEASURES = ("loss_barrier", "error_barrier", "midpoint_loss", "midpoint_error")

# What Flax calls the collection of running statistics.
_STATISTICS = "batch_stats"


def check_methods(methods: Sequence[str]) -> list[str]:
    """Return one line for each problem of a list of methods."""
    known = ", ".join(rebasin.METHODS)
    problems = [f"methods: wanted some of {known}, got {m!r}" for m in methods if m not in rebasin.METHODS]
    if not methods or len(set(methods)) != len(methods):
        problems.append(f"methods: wanted at least one, none twice, got {list(methods)}")
    return problems


def build_matchers(
    setup: Setup[Any],
    methods: Sequence[str],
    *,
    num_steps: int | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Matcher]:
    """Return the functions behind the names of methods.

    Weights and activations are matched as the config's algorithm says. Methods that need data are given the
    `match_data` of the setup; methods that draw at random are given the seed of the config, unless the caller
    passes a ``key``, such as that of a pair.

    Args:
      setup: what the experiment measures with.
      methods: names in `rebasin.METHODS`.
      num_steps: number of gradient steps of the methods that learn a permutation; `None` for their default.
      options: options of single methods, by name, in place of their defaults.

    Returns:
      ``match(params_a, params_b, key=…) -> MatchResult`` for each name.
    """
    data = jax.device_put(setup.match_data)
    given = options or {}
    return {name: _build_matcher(setup, name, data, num_steps, given.get(name, {})) for name in methods}


def _build_matcher(
    setup: Setup[Any], name: str, data: Any, num_steps: int | None, given: Mapping[str, Any]
) -> Matcher:
    """Return the function of one method; the only place that knows how methods are called."""
    takes_steps = "num_steps" in {field.name for field in dataclasses.fields(rebasin.METHODS[name])}
    options = {"num_steps": num_steps} if takes_steps and num_steps is not None else {}
    return functools.partial(
        rebasin.match,
        setup.spec,
        method=as_method(name, **{**algorithm_options(setup.config.algorithm, name), **options, **given}),
        key=jax.random.key(setup.config.seed),
        # A method keeps what it compiled for a function, which must therefore be one for all pairs.
        apply_fn=setup.apply_fn,
        metrics_fn=setup.metrics_fn,
        data=data,
    )


class MethodComparison:
    """Matches pairs of networks by several methods, and measures the paths that are left on test data.

    Args:
      setup: what the experiment measures with.
      methods: names of matching methods.
      num_test: number of test examples on which paths are measured, `None` for all.
      num_steps: number of gradient steps of the methods that learn a permutation; `None` for their default.
      num_repair: number of training examples, among those for matching, from which REPAIR and norms take
        statistics; `None` measures no path but the plain one.
      options: options of single methods, by name, in place of their defaults.
      observe: called with the name of a method, A and P[B], for experiments that measure more of them.
    """

    def __init__(
        self,
        setup: Setup[Any],
        methods: Sequence[str],
        *,
        num_test: int | None,
        num_steps: int | None = None,
        num_repair: int | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        observe: Callable[[str, Any, Any], None] | None = None,
    ) -> None:
        self._setup, self._methods, self._num_repair = setup, methods, num_repair
        self._observe = observe
        self._matchers = build_matchers(setup, methods, num_steps=num_steps, options=options)
        size = len(setup.dataset.test.labels)
        test = setup.dataset.take(num_test=min(num_test or size, size)).test
        self._images, self._test = jax.device_put((setup.match_data.inputs[:num_repair], test))
        self._sweep = rebasin.build_sweep(setup.metrics_fn, num_alphas=setup.config.num_alphas)

    def measure(
        self, trained: Sequence[Trajectory], pair: Pair, title: str, begun: Mapping[str, MatchRecord[float]]
    ) -> Iterator[Mapping[str, MatchRecord[float]]]:
        """Measure the last networks of two trajectories under every method that is not measured yet.

        Args:
          trained: both trajectories.
          pair: the pair that they are.
          title: name of the pair, for the progress bar.
          begun: the records of the methods that are measured already.

        Yields:
          The records so far by method, that of `BASELINE` first; again after each method.
        """
        params_a, params_b = (trajectory.last for trajectory in trained)
        records = dict(begun)
        missing = [name for name in self.names if name not in records]
        with self._setup.reporter.stage(title, len(missing)) as advance:
            for name in missing:
                records[name] = self._measure_method(name, params_a, params_b, pair)
                yield dict(records)
                advance()

    @property
    def names(self) -> tuple[str, ...]:
        """What is measured of each pair: `BASELINE`, then the methods."""
        return (BASELINE, *self._methods)

    def _measure_method(self, name: str, params_a: Any, params_b: Any, pair: Pair) -> MatchRecord[float]:
        """Match by one method and measure the paths that it leaves."""
        began = time.perf_counter()
        match = None if name == BASELINE else self._matchers[name](params_a, params_b, key=pair.key)
        seconds = 0.0 if match is None else time.perf_counter() - began
        self._setup.seconds.add("matching", seconds)
        with self._setup.seconds.count("barriers"):
            moved = params_b
            if match is not None:
                moved = rebasin.permute(self._setup.spec, match.permutation, params_b)
                if self._observe is not None:
                    self._observe(name, params_a, moved)
            repaired = reset = None
            if self._num_repair is not None:
                repaired = _test_path(self._repaired(params_a, moved))
                if _STATISTICS in params_a:
                    reset = _test_path(self._reset_sweep(params_a, moved, self._test))
            return MatchRecord(
                objective=None if match is None else Objective(*(float(match.objective[i]) for i in (0, -1))),
                seconds=seconds,
                distance=distance(params_a, moved),
                plain=_test_path(self._sweep(params_a, moved, self._test)),
                repaired=repaired,
                reset=reset,
            )

    def _repaired(self, params_a: Any, moved: Any) -> BarrierCurve:
        """Measure the path with REPAIR at every alpha."""
        setup = self._setup
        repair = rebasin.build_repair(setup.spec, params_a, moved, setup.apply_fn, self._images)
        return self._prepared_sweep(repair.apply, repair.prepare)(params_a, moved, self._test)

    @functools.cached_property
    def _reset_sweep(self) -> Callable[..., BarrierCurve]:
        """A sweep in which the network at every alpha has running statistics of its own."""
        setup = self._setup

        def pixels(images: jax.Array) -> jax.Array:
            return normalise(images, setup.dataset.mean, setup.dataset.std)

        def update(params: Any, images: jax.Array) -> Any:
            return params | setup.model.apply(params, pixels(images), mutable=[_STATISTICS])[1]

        def apply(params: Any, images: jax.Array, prepared: Any) -> jax.Array:
            del params
            return setup.apply_fn(prepared, images)

        anything = setup.model.init(jax.random.key(0), pixels(self._images[:1]))
        return self._prepared_sweep(apply, rebasin.build_norm_reset(anything, update, self._images))

    def _prepared_sweep(
        self, apply: Callable[[Any, Any, Any], jax.Array], prepare: Callable[[Any, Any], Any]
    ) -> Callable[..., BarrierCurve]:
        """Return a sweep of ``apply(params, images, prepare(params, alpha))``."""
        metrics_fn = rebasin.classification_metrics(apply)
        return rebasin.build_sweep(metrics_fn, num_alphas=self._setup.config.num_alphas, prepare=prepare)


def _test_path(curve: BarrierCurve) -> TestPath[float]:
    middle = len(curve.alphas) // 2
    return TestPath(
        loss_barrier=curve.loss_barrier.value,
        error_barrier=curve.error_barrier.value,
        midpoint_loss=float(curve.loss[middle]),
        midpoint_error=float(curve.error[middle]),
        error=tuple(curve.error.tolist()),
    )
