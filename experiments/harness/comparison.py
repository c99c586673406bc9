"""Matching methods side by side: each on the same pair of networks, and the test segment that it leaves."""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

import rebasin
from experiments.harness.experiment import Setup
from experiments.harness.matchers import build_matchers
from rebasin.training.data import Split, normalise
from rebasin.training.loop import build_metrics, classification_metrics
from rebasin.training.trajectory import Trajectory

__all__ = ["BASELINE", "MEASURES", "VARIANTS", "Bench"]

# What Flax calls the collection of running statistics.
_STATISTICS = "batch_stats"

# The pair as it was trained.
BASELINE = "none"

# The segment as it is, with REPAIR, and with new running statistics where the model has norms that keep some.
VARIANTS = ("plain", "repaired", "reset")

# What is summed up of a segment.
MEASURES = ("loss_barrier", "error_barrier", "midpoint_loss", "midpoint_error")


class Bench:
    """Matches pairs of networks by several methods, and measures them on test data.

    Args:
      setup: of the experiment.
      methods: names of matching methods.
      num_test: test examples on which segments are measured, `None` for all.
      num_steps: gradient steps of the methods that learn a permutation; `None` for their default.
      num_repair: training examples, of those matched on, from which REPAIR and norms take statistics;
        `None` leaves all but the plain segment out.
    """

    def __init__(
        self,
        setup: Setup[Any],
        methods: Sequence[str],
        *,
        num_test: int | None,
        num_steps: int | None = None,
        num_repair: int | None = None,
    ) -> None:
        self._setup, self._methods, self._num_repair = setup, methods, num_repair
        self._matchers = build_matchers(setup, methods, num_steps=num_steps)
        dataset, config = setup.dataset, setup.config
        train, test = len(dataset.train.labels), len(dataset.test.labels)
        chosen = dataset.take(
            num_train=min(config.num_match or train, train), num_test=min(num_test or test, test)
        )
        self._images, self._test = jax.device_put((chosen.train.images[:num_repair], chosen.test))
        metrics = build_metrics(setup.model, dataset.mean, dataset.std)
        self._sweep = rebasin.build_sweep(metrics, num_alphas=config.num_alphas)

    def measure(self, trained: Sequence[Trajectory], title: str) -> dict[str, Any]:
        """The record of each method, with that of `BASELINE` first.

        Args:
          trained: both trajectories; their last networks are compared.
          title: says which, for the progress bar.
        """
        a, b = (trajectory.last for trajectory in trained)
        names = (BASELINE, *self._methods)
        with self._setup.reporter.stage(title, len(names)) as advance:
            records = {}
            for name in names:
                records[name] = self._try(name, a, b)
                advance()
        return records

    def _try(self, name: str, a: Any, b: Any) -> dict[str, Any]:
        """Matches by one method and measures the segment that it leaves."""
        results = self._setup.results
        began = time.perf_counter()
        match = None if name == BASELINE else self._matchers[name](a, b)
        seconds = 0.0 if match is None else time.perf_counter() - began
        results.add_seconds("matching", seconds)
        began = time.perf_counter()
        moved = b if match is None else rebasin.permute(self._setup.spec, match.permutation, b)
        record = {
            "objective": None if match is None else [float(match.objective[i]) for i in (0, -1)],
            "seconds": seconds,
            "distance": _distance(a, moved),
            "plain": _measures(self._sweep(a, moved, self._test)),
        }
        if self._num_repair is not None:
            record["repaired"] = _measures(self._repaired(a, moved))
            if _STATISTICS in a:
                record["reset"] = _measures(self._reset_sweep(a, moved, self._test))
        results.add_seconds("barriers", time.perf_counter() - began)
        return record

    def _repaired(self, a: Any, moved: Any) -> rebasin.BarrierCurve:
        """The segment with REPAIR at every α."""
        repair = rebasin.build_repair(self._setup.spec, a, moved, self._logits, self._images)
        return self._prepared(repair.apply, repair.prepare)(a, moved, self._test)

    @functools.cached_property
    def _reset_sweep(self) -> Callable[..., rebasin.BarrierCurve]:
        """A sweep in which every network between A and B has running statistics of its own."""

        def update(variables: Any, images: jax.Array) -> Any:
            pixels = normalise(images, self._setup.dataset.mean, self._setup.dataset.std)
            return variables | self._setup.model.apply(variables, pixels, mutable=[_STATISTICS])[1]

        def apply(variables: Any, images: jax.Array, prepared: Any) -> jax.Array:
            del variables
            return self._logits(prepared, images)

        return self._prepared(apply, rebasin.build_norm_reset(update, self._images))

    def _logits(self, variables: Any, images: jax.Array) -> jax.Array:
        dataset = self._setup.dataset
        return self._setup.model.apply(variables, normalise(images, dataset.mean, dataset.std))

    def _prepared(
        self, apply: Callable[[Any, Any, Any], jax.Array], prepare: Callable[[Any, Any], Any]
    ) -> Callable[..., rebasin.BarrierCurve]:
        """A sweep of ``apply(variables, images, prepare(variables, alpha))``."""

        def metrics(variables: Any, batch: Split, prepared: Any) -> dict[str, jax.Array]:
            return classification_metrics(apply(variables, batch.images, prepared), batch.labels)

        return rebasin.build_sweep(metrics, num_alphas=self._setup.config.num_alphas, prepare=prepare)


def _measures(curve: rebasin.BarrierCurve) -> dict[str, Any]:
    middle = len(curve.alphas) // 2
    return {
        "loss_barrier": curve.loss_barrier.value,
        "error_barrier": curve.error_barrier.value,
        "midpoint_loss": float(curve.loss[middle]),
        "midpoint_error": float(curve.error[middle]),
        "segment_error": curve.error.tolist(),
    }


def _distance(a: Any, b: Any) -> float:
    """‖A − P[B]‖, float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(x, np.float64) - np.asarray(y)) ** 2) for x, y in pairs)))
