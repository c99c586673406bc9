"""Aligning several networks by the loss between all pairs of them.

The straight-through estimator of git-re-basin (arXiv 2209.04836, section 3.3), as `straight_through_matching`
has it, learns the permutation of one network from the loss of the midpoint with another. Here one permutation
of every network is learned from the midpoints of all pairs at once, so that no network is a reference for
the others. With P_0 the identity, the objective is

    −mean over pairs i < j of ℓ(½ P_i[θ_i] + ½ P_j[θ_j]).

Every network but the first has a target, which is at first the mean of the others in their common order.
Each step moves the targets down the gradient of the loss with respect to P_i[θ_i], and matches every network
with its target again.
"""

import functools
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.arithmetic import average, interpolate, widen_weights
from rebasin.barrier import MetricsFn
from rebasin.batches import check_counts
from rebasin.errors import ConfigError
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
from rebasin.matching.many import UniverseResult, match_to_reference, merge_many
from rebasin.matching.method import check_networks
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, check_permutation, compiled_permute, compose, invert
from rebasin.roles import RoleNames, check_roles
from rebasin.spec import PermutationSpec

__all__ = ["all_pairs_matching"]


def all_pairs_matching(
    spec: PermutationSpec,
    trees: Sequence[Any],
    metrics_fn: MetricsFn,
    data: Any,
    *,
    key: jax.Array,
    starts: Sequence[Sequence[Permutation]] = (),
    restarts: int = 0,
    num_steps: int = 100,
    learning_rate: float = 1e-2,
    batch_size: int = 500,
    roles: RoleNames = None,
) -> UniverseResult:
    """Find one permutation of each network so that the midpoints of all pairs have low losses.

    Args:
      spec: the symmetries of the networks.
      trees: the networks, two or more, of equal leaves, shapes and dtypes.
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``, one loss for each example, differentiable in
        `params`.
      data: a `Batch`, or whatever tree of arrays ``[n, …]`` `metrics_fn` takes as its batch.
      key: PRNG key for the shuffled batches, for `merge_many` and for weight matching.
      starts: permutations of all networks into a common order that may be started from, beside the results of
        `merge_many` and of `match_to_reference` by weights. On narrow networks those of `match_to_reference`
        by activations are much better than both.
      restarts: number of runs after the first. The runs begin at different starts, the best of them first,
        with as many results of `merge_many` among them as there are runs; the best run is kept.
      num_steps: number of gradient steps of a run, at least 1.
      learning_rate: learning rate of Adam on the targets.
      batch_size: number of examples of a gradient step, and number of examples evaluated at once.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find; only weights count.

    Returns:
      A permutation of each network into the order of units of network 0, the best that was reached. Its
      ``objective`` is the best so far at the start and after each step of the best run, and is that of the
      loss above, not the inner product of weights. ``stats`` holds the final objective of every run
      (``runs``) and ``seconds``.

    Raises:
      RebasinError: Optax is not installed.
      ConfigError: there are fewer than two networks, a start holds another number of permutations, or an
        option has a value that cannot work.
      PermutationError: a permutation of a start does not fit.
      SpecMismatchError, TreeMismatchError, NonFiniteError, DataError: as `straight_through_matching`.
    """
    began = time.perf_counter()
    check_counts(1, num_steps=num_steps, batch_size=batch_size)
    check_counts(0, restarts=restarts)
    if len(trees) < 2:
        raise ConfigError(f"all_pairs_matching needs at least two networks, got {len(trees)}")
    checked = check_networks(spec, {f"network {i}": tree for i, tree in enumerate(trees)}, roles)
    check_metrics(metrics_fn, checked.trees[0], data, batch_size)
    import_optax("all_pairs_matching")
    found = [_checked(spec, trees[0], start, len(trees)) for start in starts]
    keys = [jax.random.fold_in(key, i) for i in range(1 + restarts)]
    found += [merge_many(spec, trees, key=k, roles=roles).permutations for k in keys]
    found.append(match_to_reference(spec, trees, key=key, roles=roles).permutations)
    run = _Run(spec, checked.trees, checked.weights, metrics_fn, data, batch_size, check_roles(roles))
    begun = sorted(map(run.begin, found), key=lambda history: -history.objective)
    options = {"num_steps": num_steps, "learning_rate": learning_rate}
    runs = [run(history, key=k, **options) for history, k in zip(begun, keys, strict=False)]
    best = max(runs, key=lambda history: history.objective)
    match = best.result({})
    stats = {"runs": [history.objective for history in runs], "seconds": time.perf_counter() - began}
    permutations = tuple(_split(match.permutation, len(trees)))
    return UniverseResult(permutations, match.objective, match.num_iterations, match.converged, stats)


class _Run:
    """One run of the estimator, and what all runs share."""

    def __init__(
        self,
        spec: PermutationSpec,
        trees: Sequence[Any],
        weights: frozenset[str],
        metrics_fn: MetricsFn,
        data: Any,
        batch_size: int,
        roles: Any,
    ) -> None:
        self._spec, self._trees, self._weights = spec, trees, weights
        self._metrics_fn, self._data, self._batch_size, self._roles = metrics_fn, data, batch_size, roles
        # What is learned is float32 at least: the steps of Adam are too small for narrower types.
        self._wide = [widen_weights(tree, weights) for tree in trees]

    def begin(self, start: Sequence[Permutation]) -> LossHistory:
        """Return the history that begins with a permutation of each network."""
        return LossHistory.begin(_join(start), self._loss)

    def __call__(
        self, history: LossHistory, *, key: jax.Array, num_steps: int, learning_rate: float
    ) -> LossHistory:
        """Return a history with as many steps more."""
        optax = import_optax("all_pairs_matching")
        count = len(self._trees)
        moved = self._moved(history.current)
        others = [[m for j, m in enumerate(moved) if j != i] for i in range(1, count)]
        targets = [weights_of(average(rest, roles=self._roles), self._weights) for rest in others]
        optimizer = optax.adam(learning_rate)
        state = optimizer.init(targets)
        match_key, batch_key = jax.random.split(key)
        batches = iter_batches(batch_key, self._data, self._batch_size)
        for step, batch in zip(range(num_steps), batches, strict=False):
            gradients = self._gradient(step, history.current, batch)
            updates, state = optimizer.update(gradients, state)
            targets = optax.apply_updates(targets, updates)
            step_key = jax.random.fold_in(match_key, step)
            nearest = self._nearest(targets, _split(history.current, count), step_key)
            history = history.after_step(_join(nearest), self._loss)
        return history

    def _nearest(
        self, targets: Sequence[Mapping[str, Any]], current: Sequence[Permutation], key: jax.Array
    ) -> list[Permutation]:
        """Match every network but the first with its target."""
        found = [current[0]]
        for i, target in enumerate(targets, 1):
            match = weight_matching(
                self._spec,
                with_weights(self._wide[0], target),
                self._wide[i],
                key=jax.random.fold_in(key, i),
                start=current[i],
                restarts=0,
                roles=self._roles,
            )
            found.append(match.permutation)
        return found

    def _moved(self, joint: Permutation) -> list[Any]:
        permutations = _split(joint, len(self._wide))
        pairs = zip(permutations, self._wide, strict=True)
        return [compiled_permute(self._spec, permutation, tree) for permutation, tree in pairs]

    def _gradient(self, step: int, joint: Permutation, batch: Any) -> list[dict[str, Any]]:
        """Return the gradient of the loss in the moved weights of every network but the first."""
        moved = [weights_of(tree, self._weights) for tree in self._moved(joint)]
        stacked = {path: jnp.stack([one[path] for one in moved]) for path in moved[0]}
        loss, gradient = _pairs_gradient(
            stacked, self._trees[0], batch, metrics_fn=self._metrics_fn, count=len(moved)
        )
        check_step(step, gradient, loss)
        return [{path: g[i] for path, g in gradient.items()} for i in range(1, len(moved))]

    def _loss(self, joint: Permutation) -> float:
        """Return the mean over pairs of the loss of the midpoint, over all data."""
        permutations = _split(joint, len(self._trees))
        pairs = zip(permutations, self._trees, strict=True)
        moved = [compiled_permute(self._spec, permutation, tree) for permutation, tree in pairs]
        evaluate: Callable[..., jax.Array] = functools.partial(
            mean_loss, metrics_fn=self._metrics_fn, batch_size=self._batch_size
        )
        middles = (interpolate(a, b, 0.5, roles=self._roles) for a, b in itertools.combinations(moved, 2))
        return float(np.mean([float(evaluate(middle, self._data)) for middle in middles]))


@functools.partial(jax.jit, static_argnames=("metrics_fn", "count"))
def _pairs_gradient(
    stacked: Mapping[str, jax.Array],
    like: Any,
    batch: Any,
    *,
    metrics_fn: MetricsFn,
    count: int,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the mean over pairs of the loss of the midpoint, and its gradient in the stacked weights.

    Args:
      stacked: the weights of all networks by path name, ``[count, …]``.
      like: a tree that holds what is no weight, and the dtypes in which networks are evaluated.
      batch: what `metrics_fn` takes as its batch.
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``.
      count: number of networks.
    """
    first, second = np.array(list(itertools.combinations(range(count), 2))).T

    def loss(stacked: Mapping[str, jax.Array]) -> jax.Array:
        def midpoint_loss(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
            middle = {path: (x[pair[0]] + x[pair[1]]) / 2 for path, x in stacked.items()}
            tree = jax.tree.map(lambda x, y: x.astype(y.dtype), with_weights(like, middle), like)
            return metrics_fn(tree, batch)["loss"].mean()

        # One body for all pairs, so that the program does not grow with their number.
        return jnp.mean(jax.lax.map(midpoint_loss, (jnp.asarray(first), jnp.asarray(second))))

    value, gradient = jax.value_and_grad(loss)(dict(stacked))
    # The gradient of JAX in a complex weight is the conjugate of the direction in which the loss rises.
    return value, jax.tree.map(jnp.conj, gradient)


def _join(permutations: Sequence[Permutation]) -> dict[str, Any]:
    """Return the permutations of all networks as one mapping, whose groups begin with a network's number."""
    return {f"{i}:{group}": row for i, one in enumerate(permutations) for group, row in one.items()}


def _split(joint: Permutation, count: int) -> list[dict[str, np.ndarray]]:
    """Undo `_join`."""
    split: list[dict[str, np.ndarray]] = [{} for _ in range(count)]
    for name, row in joint.items():
        number, group = name.split(":", 1)
        split[int(number)][group] = np.asarray(row)
    return split


def _checked(spec: PermutationSpec, tree: Any, start: Sequence[Permutation], count: int) -> list[Permutation]:
    """Check the permutations to start from, and bring them into the order of units of network 0."""
    if len(start) != count:
        raise ConfigError(f"a start must hold a permutation for each of {count} networks, got {len(start)}")
    for permutation in start:
        check_permutation(spec, tree, permutation)
    undo = invert(spec, start[0])
    return [jax.tree.map(np.asarray, compose(spec, permutation, undo)) for permutation in start]
