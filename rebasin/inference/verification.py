"""Numeric proof that a spec preserves a function: in float64, with random weights and random permutations."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import VerificationError, problem_list
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves, state_leaves

__all__ = ["verify_spec"]

# Sums taken in another order differ by a few roundings; the networks in use here amplify them by less than
# this.
_ROUNDINGS = 1e5


def verify_spec(
    spec: PermutationSpec,
    function: Callable[..., Any],
    tree: Any,
    *inputs: Any,
    state_outputs: Mapping[str, str] | None = None,
    key: jax.Array | None = None,
    trials: int = 2,
) -> None:
    """Checks that permuting a tree by a spec leaves a function's outputs as they are.

    Outputs that are the next values of leaves (`state_outputs`) must come out permuted as those leaves are.

    Every floating leaf is drawn anew, since initial values hide mistakes (zero biases, equal scales): normal
    with the leaf's own root mean square, or 0.1 where that is zero, and positive where the leaf is positive
    throughout, as a variance is. Each group is then permuted by itself, without fixed points, and all groups
    are permuted together at random. Everything runs in float64, floating inputs included, unless the function
    cannot be traced so.

    Args:
      spec: what to check.
      function: ``function(tree, *inputs)``.
      tree: the tree that `spec` was made for; arrays, not shapes.
      *inputs: example inputs.
      state_outputs: as in `infer_spec`: outputs that are the next values of leaves of `tree`.
      key: PRNG key of the draws; `jax.random.key(0)` by default, since a check should be repeatable.
      trials: draws of leaves and permutations.

    Raises:
      SpecMismatchError: the spec does not fit the tree.
      TreeMismatchError: `state_outputs` do not fit the function.
      VerificationError: naming every group that changes the outputs, by how much, or that they are not
        finite.
    """
    spec.group_sizes(tree)
    key = jax.random.key(0) if key is None else key
    seeds = np.asarray(jax.random.key_data(key)).ravel().tolist()
    with jax.enable_x64(True):
        cast = _cast(function, tree, inputs)
        tree, wide = jax.tree.map(cast, (tree, inputs))
        epsilon = _narrowest_epsilon(function, tree, wide)
        state = state_leaves(state_outputs or {}, jax.eval_shape(function, tree, *wide), tree)

        @jax.jit
        def change(weights: Any, permutation: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
            before = leaf_table(function(weights, *wide))
            after = leaf_table(function(permute(spec, permutation, weights), *wide))
            finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in before.values()]))
            # The next state of the permuted network should be the permuted next state.
            next_values = {leaf: before[path] for path, leaf in state.items()}
            next_tree = map_leaves(lambda path, leaf: next_values.get(path, leaf), weights)
            moved = leaf_table(permute(spec, permutation, next_tree))
            expected = [moved[state[path]] if path in state else x for path, x in before.items()]
            return _distance(expected, list(after.values())), finite

        identity = identity_permutation(spec, tree)
        worst: dict[str, float] = {}
        for trial in range(trials):
            rng = np.random.default_rng([*seeds, trial])
            weights = map_leaves(lambda path, leaf, rng=rng: _redraw(leaf, rng), tree)
            together = {group: rng.permuted(row, axis=-1) for group, row in identity.items()}
            cases = {group: identity | {group: _derange(row, rng)} for group, row in identity.items()}
            for name, permutation in {**cases, "all groups together": together}.items():
                distance, finite = change(weights, permutation)
                if not finite:
                    raise VerificationError(
                        "the outputs are not finite for random weights, so nothing can be verified"
                    )
                worst[name] = max(worst.get(name, 0.0), float(distance))
    tolerance = epsilon * _ROUNDINGS
    guilty = {name: value for name, value in worst.items() if not value <= tolerance}
    if len(guilty) > 1:  # the joint permutation says nothing more where a single group is at fault
        guilty.pop("all groups together", None)
    if guilty:
        problems = [
            f"{name}: outputs change by {value:.1e} relative to their size "
            f"(tolerance {tolerance:.0e}){_where(spec, name)}"
            for name, value in guilty.items()
        ]
        raise VerificationError(problem_list("the spec changes the function:", problems))


def _where(spec: PermutationSpec, group: str) -> str:
    axes = [
        f"{path} axis {i}" for path, row in spec.leaves for i, axis in enumerate(row) if group in axis.groups
    ]
    return f"; it moves {', '.join(axes)}" if axes else ""


def _cast(function: Callable[..., Any], tree: Any, inputs: tuple[Any, ...]) -> Callable[[Any], Any]:
    """`_widen`, or no change for a function that insists on its types: a loop with a float32 carry."""
    try:
        jax.eval_shape(function, *jax.tree.map(_widen, (tree, *inputs)))
    except TypeError:
        return jnp.asarray
    return _widen


def _widen(x: Any) -> Any:
    """Floating arrays in float64, anything else as it is."""
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def _redraw(leaf: Any, rng: np.random.Generator) -> Any:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return leaf
    values = np.asarray(leaf, np.float64)
    scale = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    draw = rng.normal(size=values.shape) * (scale or 0.1)
    is_positive = values.size and values.min() > 0
    return jnp.asarray(np.abs(draw) + 0.1 * scale if is_positive else draw, jnp.result_type(leaf))


def _derange(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random permutation without fixed points: one cycle through all positions in random order."""
    cycle = rng.permuted(row, axis=-1)
    moved = np.empty_like(row)
    np.put_along_axis(moved, cycle, np.roll(cycle, -1, axis=-1), axis=-1)
    return moved


def _distance(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """Largest difference over all outputs, relative to the largest value of its output."""
    distances = [jnp.zeros(())]
    for x, y in zip(before, after, strict=True):
        if x.size:
            x, y = x.astype(jnp.float64), y.astype(jnp.float64)
            distances.append(
                jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(jnp.float64).tiny)
            )
    return jnp.max(jnp.stack(distances))


def _narrowest_epsilon(function: Callable[..., Any], tree: Any, inputs: tuple[Any, ...]) -> float:
    """Rounding unit of the narrowest floating type in the traced program: a model may fix its own."""
    closed = jax.make_jaxpr(function)(tree, *inputs)
    epsilons = [float(jnp.finfo(jnp.float64).eps)]
    pending = [closed.jaxpr]
    while pending:
        jaxpr = pending.pop()
        for eqn in jaxpr.eqns:
            dtypes = [var.aval.dtype for var in eqn.outvars if hasattr(var.aval, "dtype")]
            epsilons += [float(jnp.finfo(t).eps) for t in dtypes if jnp.issubdtype(t, jnp.floating)]
            pending += [
                getattr(sub, "jaxpr", sub)
                for sub in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_jaxpr)
                if _is_jaxpr(sub)
            ]
    return max(epsilons)


def _is_jaxpr(x: Any) -> bool:
    return hasattr(x, "eqns")
