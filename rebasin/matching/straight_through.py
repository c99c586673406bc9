"""Matching by the straight-through estimator (git-re-basin, arXiv 2209.04836, section 3.3).

The method learns a target network θ̃, which is A at first. Each step has two parts:

1. Weight matching, started from the permutation of the step before, finds P = argmax ⟨θ̃, P[B]⟩.
2. The loss of the midpoint, ℓ(½A + ½P[B]), is differentiated with respect to P[B], and θ̃ moves down that
   gradient as if it were P[B] itself. This is the straight-through estimate: a permutation has no gradient.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from rebasin.arithmetic import interpolate, widen_weights
from rebasin.barrier import MetricsFn
from rebasin.batches import check_counts
from rebasin.matching.learned import (
    LossHistory,
    check_metrics,
    check_step,
    import_optax,
    iter_batches,
    mean_loss,
    weights_of,
    with_weights,
)
from rebasin.matching.method import Method, build_method, check_networks, check_start
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, compiled_permute
from rebasin.roles import RoleNames
from rebasin.spec import PermutationSpec
from rebasin.trees import map_leaves

__all__ = ["StraightThroughMatching", "midpoint_gradient", "straight_through_matching"]


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class StraightThroughMatching(Method):
    """The straight-through estimator with its options.

    The objective is −ℓ(½A + ½P[B]), with the mean loss over all of the data. The steps use shuffled batches
    and Adam. The result is the permutation with the best objective of all that were reached, not the last.

    A value whose `start` is a permutation can be neither hashed nor compared, since it holds arrays.

    Attributes:
      start: the start of the first weight matching, ``"depth"`` or ``"identity"`` as in `weight_matching`; or
        a permutation, from which the first weight matching begins.
      num_steps: number of gradient steps, at least 1.
      learning_rate: learning rate of Adam on θ̃.
      batch_size: number of examples of a gradient step, and number of examples evaluated at once.
      roles: as in `Method`; weights are matched, learned and averaged.

    Raises:
      ConfigError: an option has a value that cannot work.
    """

    name = "straight_through"
    objective = "−ℓ(½A + ½P[B])"

    start: Literal["depth", "identity"] | Permutation = "depth"
    num_steps: int = 100
    learning_rate: float = 3e-3
    batch_size: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start, ("depth", "identity"))
        check_counts(1, num_steps=self.num_steps, batch_size=self.batch_size)

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments of `match` that this method cannot do without, beside the spec and the networks."""
        return "metrics_fn", "data", "key"

    def _match(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        report: Reporter,
        *,
        metrics_fn: MetricsFn,
        data: Any,
        key: jax.Array,
    ) -> MatchResult:
        began = time.perf_counter()
        user = "straight_through_matching"
        optax = import_optax(user)
        networks = {"params_a": params_a, "params_b": params_b}
        (params_a, params_b), weights = check_networks(spec, networks, self.roles)
        check_metrics(metrics_fn, params_a, data, self.batch_size)
        loss = self._build_midpoint_loss(spec, params_a, params_b, metrics_fn, data)
        # What is learned is float32 at least: the steps of Adam are too small for narrower types.
        wide_a, wide_b = (widen_weights(tree, weights) for tree in (params_a, params_b))
        match_key, batch_key = jax.random.split(key)
        match = functools.partial(weight_matching, spec, params_b=wide_b, roles=self.roles)
        first = match(params_a=wide_a, key=match_key, start=self.start).permutation
        start = self.start if isinstance(self.start, Mapping) else first
        history = LossHistory.begin(start, loss).after_step(first, loss)
        target = weights_of(wide_a, weights)
        optimizer = optax.adam(self.learning_rate)
        state = optimizer.init(target)
        batches = iter_batches(batch_key, data, self.batch_size)
        report("step", 0, self.num_steps, history.objective)
        for step, batch in zip(range(self.num_steps), batches, strict=False):
            moved = weights_of(compiled_permute(spec, history.current, wide_b), weights)
            step_loss, gradient = midpoint_gradient(
                moved, params_a, batch, metrics_fn=metrics_fn, roles=self.roles
            )
            check_step(step, gradient, step_loss)
            updates, state = optimizer.update(gradient, state)
            target = optax.apply_updates(target, updates)
            step_key = jax.random.fold_in(match_key, step)
            tree = with_weights(wide_a, target)
            nearest = match(params_a=tree, key=step_key, start=history.current, restarts=0).permutation
            history = history.after_step(nearest, loss)
            report("step", step + 1, self.num_steps, history.objective)
        return history.result({"seconds": time.perf_counter() - began})

    def _build_midpoint_loss(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, metrics_fn: MetricsFn, data: Any
    ) -> Callable[[Permutation], float]:
        """Build the function from a permutation to the loss of the midpoint over all data."""

        def midpoint_loss(permutation: Permutation) -> float:
            moved = compiled_permute(spec, permutation, params_b)
            middle = interpolate(params_a, moved, 0.5, roles=self.roles)
            return float(mean_loss(middle, data, metrics_fn=metrics_fn, batch_size=self.batch_size))

        return midpoint_loss


def straight_through_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    metrics_fn: MetricsFn,
    data: Any,
    *,
    key: jax.Array,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B whose midpoint with A has a low loss.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``, one loss for each example, differentiable in
        `params`.
      data: a `Batch`, or whatever tree of arrays ``[n, …]`` `metrics_fn` takes as its batch.
      key: PRNG key for the shuffled batches and for weight matching.
      progress: called at the start, after each step and at the end, as in `Method.match`.
      **options: fields of `StraightThroughMatching`, which documents them.

    Returns:
      The match. ``objective`` is the best so far: at the start, after the first weight matching, and after
      each step. ``converged`` says whether the last step left the permutation unchanged. ``stats`` holds the
      midpoint loss of each of these permutations (``losses``), the number of times that it was computed
      (``evaluations``), and ``seconds``.

    Raises:
      RebasinError: Optax is not installed.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight, the loss of a midpoint, or a gradient is NaN or infinite.
      DataError: the data are empty or of different lengths, or `metrics_fn` does not return one loss for each
        example.
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option has a value that cannot work.
    """
    method = build_method(StraightThroughMatching, options)
    return method.match(
        spec, params_a, params_b, key=key, metrics_fn=metrics_fn, data=data, progress=progress
    )


@functools.partial(jax.jit, static_argnames=("metrics_fn", "roles"))
def midpoint_gradient(
    moved: Mapping[str, Any], params_a: Any, batch: Any, *, metrics_fn: MetricsFn, roles: RoleNames = ()
) -> tuple[jax.Array, dict[str, Any]]:
    """Return the mean loss of the midpoint, and its gradient with respect to the weights of P[B].

    The midpoint is formed in the dtype of `moved` and rounded to that of A before the network is evaluated.

    The gradient of a complex weight points to where the loss rises, ∂ℓ/∂Re + i ∂ℓ/∂Im; that of JAX is its
    conjugate.

    Args:
      moved: the weights of P[B], by path name.
      params_a: tree of A.
      batch: what `metrics_fn` takes as its batch.
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``.
      roles: roles of leaves of A that would not be found, as pairs; weights are averaged.
    """

    def loss(moved: Mapping[str, Any]) -> jax.Array:
        wide_a = map_leaves(lambda path, x: x.astype(moved[path].dtype) if path in moved else x, params_a)
        middle = interpolate(wide_a, with_weights(params_a, moved), 0.5, roles=roles)
        narrow = jax.tree.map(lambda x, like: x.astype(like.dtype), middle, params_a)
        return metrics_fn(narrow, batch)["loss"].mean()

    value, gradient = jax.value_and_grad(loss)(moved)
    return value, jax.tree.map(jnp.conj, gradient)
