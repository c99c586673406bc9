"""Matching by the straight-through estimator (git-re-basin, arXiv 2209.04836, section 3.3).

A target network θ̃, at first A, is learned so that the permutation which brings B closest to it makes a good
midpoint with A. Each step finds that permutation, P = argmax ⟨θ̃, P[B]⟩, by weight matching from the last one,
and moves θ̃ down the gradient of the midpoint's loss ℓ(½A + ½P[B]) in P[B], as if θ̃ were P[B] itself.
"""

import functools
import time
from typing import Any

import jax

from rebasin.matching.learned import (
    LossFn,
    Search,
    check_loss,
    check_step,
    import_optax,
    iter_batches,
    mean_loss,
    weights_of,
    with_weights,
)
from rebasin.matching.method import check_at_least, check_networks
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import AscentStart as Start
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, compiled_permute
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, interpolate, is_weight

__all__ = ["straight_through_matching"]


def straight_through_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    loss_fn: LossFn,
    data: Any,
    *,
    key: jax.Array,
    start: Start | Permutation = "depth",
    num_steps: int = 100,
    learning_rate: float = 3e-3,
    batch_size: int = 500,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B whose midpoint with A has a low loss.

    The objective is −ℓ(½A + ½P[B]), the mean over all of `data`. Steps use shuffled batches and Adam. Of all
    permutations met, the best in the objective is returned, not the last.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      loss_fn: ``(params, batch) -> [n]``, one loss for each example, differentiable in `params`.
      data: tree of arrays ``[n, …]`` with one common n.
      key: PRNG key for the batches and for the weight matching inside.
      start: of the first weight matching; a permutation is where that one begins.
      num_steps: gradient steps, at least 1.
      learning_rate: of Adam on θ̃.
      batch_size: examples for each step, and at once in an evaluation.
      predicate: ``(path, leaf) -> bool``, the leaves that are matched, learned and averaged.

    Returns:
      The match. ``objective`` is the best so far: at the start, after the first weight matching, and after
      each step. ``converged`` says whether the last step left the permutation as it was. ``stats`` has the
      midpoint loss of every step's own permutation (``losses``), the ``evaluations`` of it, and ``seconds``.

    Raises:
      RebasinError: Optax is not installed.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight, or the loss of a midpoint, is NaN or infinite.
      DataError: the data are empty or of different lengths, or `loss_fn` returns something else than [n].
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option has a value that cannot work.
    """
    began = time.perf_counter()
    optax = import_optax("straight_through_matching")
    check_at_least(1, num_steps=num_steps)
    check_networks(spec, {"params_a": params_a, "params_b": params_b}, predicate)
    check_loss(loss_fn, params_a, data, batch_size, user="straight_through_matching")

    def midpoint_loss(permutation: Permutation) -> float:
        middle = interpolate(
            params_a, compiled_permute(spec, permutation, params_b), 0.5, predicate=predicate
        )
        return float(mean_loss(middle, data, loss_fn=loss_fn, batch_size=batch_size))

    match_key, batch_key = jax.random.split(key)
    match = weight_matching(spec, params_a, params_b, key=match_key, start=start, predicate=predicate)
    search = Search(midpoint_loss, match.permutation if isinstance(start, str) else start)
    search.offer(match.permutation)
    target = weights_of(params_a, predicate)
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(target)
    for step, batch in zip(range(num_steps), iter_batches(batch_key, data, batch_size), strict=False):
        moved = weights_of(compiled_permute(spec, search.current, params_b), predicate)
        loss, gradient = _loss_and_gradient(moved, params_a, batch, loss_fn=loss_fn, predicate=predicate)
        check_step(step, gradient, loss)
        updates, state = optimizer.update(gradient, state)
        target = optax.apply_updates(target, updates)
        match = weight_matching(
            spec,
            with_weights(params_a, target),
            params_b,
            key=jax.random.fold_in(match_key, step),
            start=search.current,
            restarts=0,
            predicate=predicate,
        )
        search.offer(match.permutation)
    return search.result({"seconds": time.perf_counter() - began})


@functools.partial(jax.jit, static_argnames=("loss_fn", "predicate"))
def _loss_and_gradient(
    moved: dict[str, Any], params_a: Any, batch: Any, *, loss_fn: LossFn, predicate: LeafPredicate
) -> tuple[jax.Array, dict[str, Any]]:
    """The midpoint's mean loss, and its gradient in the weights of P[B]."""

    def loss(moved: dict[str, Any]) -> jax.Array:
        middle = interpolate(params_a, with_weights(params_a, moved), 0.5, predicate=predicate)
        return loss_fn(middle, batch).mean()

    return jax.value_and_grad(loss)(moved)
