"""Checks numerically that a spec preserves a function: in float64, with random weights and permutations."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import VerificationError, problem_list
from rebasin.inference.programs import iter_equations
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves, state_leaves

__all__ = ["verify_spec"]

# Sums taken in another order differ by a few roundings. The networks of the tests amplify them by less than
# this factor.
_ROUNDINGS = 1e5

_TOGETHER = "all groups together"


def verify_spec(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    state_outputs: Mapping[str, str] | None = None,
    key: jax.Array | None = None,
    trials: int = 2,
) -> None:
    """Check that permuting a tree by a spec leaves the outputs of a function as they are.

    Outputs that are the next values of leaves (`state_outputs`) must come out permuted as those leaves are.

    Every floating leaf is drawn anew, since initial values hide mistakes (zero biases, equal scales). The
    draws are normal with the leaf's own root mean square, or 0.1 where that is zero, and positive where the
    leaf is positive throughout, as a variance is. Each group is then permuted by itself, without fixed
    points, and all groups are permuted together at random. Everything runs in float64, floating inputs
    included, unless the function cannot be traced with such arguments.

    Args:
      spec: the spec to check.
      apply_fn: the function, called as ``apply_fn(params, *inputs)``.
      params: the tree that `spec` was made for; arrays, not shapes.
      *inputs: example inputs.
      state_outputs: the outputs that are the next values of leaves of `params`, as in `infer_spec`.
      key: PRNG key of the draws; `jax.random.key(0)` by default, since a check should be repeatable.
      trials: number of times that leaves and permutations are drawn.

    Raises:
      SpecMismatchError: the spec does not fit the tree.
      TreeMismatchError: `state_outputs` do not fit the function.
      VerificationError: some groups change the outputs (each is named, with the size of the change), or the
        outputs are not finite.
    """
    spec.group_sizes(params)
    key = jax.random.key(0) if key is None else key
    seeds = np.asarray(jax.random.key_data(key)).ravel().tolist()
    changes: dict[str, float] = {}  # the largest over all trials
    with jax.enable_x64(True):
        cast = _choose_cast(apply_fn, params, inputs)
        params, inputs = jax.tree.map(cast, (params, inputs))
        tolerance = _ROUNDINGS * _narrowest_epsilon(apply_fn, params, inputs)
        measure_change = _build_measure_change(spec, apply_fn, params, inputs, state_outputs or {})
        identity = identity_permutation(spec, params)
        for trial in range(trials):
            rng = np.random.default_rng([*seeds, trial])
            drawn = map_leaves(lambda path, leaf, rng=rng: _redraw(leaf, rng), params)
            for name, permutation in _permutations(identity, rng):
                change, finite = measure_change(drawn, permutation)
                if not finite:
                    raise VerificationError(
                        "the outputs are not finite for random weights, so nothing can be verified"
                    )
                changes[name] = max(changes.get(name, 0.0), float(change))
    _check_changes(spec, changes, tolerance)


def _permutations(
    identity: Mapping[str, np.ndarray], rng: np.random.Generator
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Draw a permutation of each group by itself, and one of all groups together, each with a name."""
    together = {group: rng.permuted(row, axis=-1) for group, row in identity.items()}
    for group, row in identity.items():
        yield group, {**identity, group: _derange(row, rng)}
    yield _TOGETHER, together


def _build_measure_change(
    spec: PermutationSpec,
    apply_fn: Callable[..., Any],
    params: Any,
    inputs: tuple[Any, ...],
    state_outputs: Mapping[str, str],
) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Build a compiled function: how much a permutation changes the outputs, and whether they are finite."""
    leaf_of = state_leaves(state_outputs, jax.eval_shape(apply_fn, params, *inputs), params)

    @jax.jit
    def measure_change(drawn: Any, permutation: Any) -> tuple[jax.Array, jax.Array]:
        before = leaf_table(apply_fn(drawn, *inputs))
        after = leaf_table(apply_fn(permute(spec, permutation, drawn), *inputs))
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in before.values()]))
        # The next state of the permuted network should be the next state of the network, permuted.
        next_values = {leaf: before[path] for path, leaf in leaf_of.items()}
        next_params = map_leaves(lambda path, leaf: next_values.get(path, leaf), drawn)
        moved = leaf_table(permute(spec, permutation, next_params))
        expected = [moved[leaf_of[path]] if path in leaf_of else x for path, x in before.items()]
        return _largest_difference(expected, list(after.values())), finite

    return measure_change


def _check_changes(spec: PermutationSpec, changes: Mapping[str, float], tolerance: float) -> None:
    """Raise an error that names every permutation whose change is above the tolerance."""
    guilty = {name: change for name, change in changes.items() if not change <= tolerance}
    if len(guilty) > 1:  # the joint permutation says nothing more where a single group is at fault
        guilty.pop(_TOGETHER, None)
    if guilty:
        problems = [
            f"{name}: outputs change by {change:.1e} relative to their size "
            f"(tolerance {tolerance:.0e}){_where(spec, name)}"
            for name, change in guilty.items()
        ]
        raise VerificationError(problem_list("the spec changes the function:", problems))


def _where(spec: PermutationSpec, group: str) -> str:
    """List the axes that a group moves, as the end of a message."""
    axes = [
        f"{path} axis {i}" for path, row in spec.leaves for i, axis in enumerate(row) if group in axis.groups
    ]
    return f"; it moves {', '.join(axes)}" if axes else ""


def _choose_cast(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Return `_widen`, or no change for a function that insists on its types: a loop with a float32 carry."""
    try:
        jax.eval_shape(apply_fn, *jax.tree.map(_widen, (params, *inputs)))
    except TypeError:
        return jnp.asarray
    return _widen


def _widen(x: Any) -> Any:
    """Convert a floating array to float64; return anything else as it is."""
    return jnp.asarray(x, jnp.float64) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x


def _redraw(leaf: Any, rng: np.random.Generator) -> Any:
    """Draw a floating leaf anew, as `verify_spec` describes; return any other leaf as it is."""
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
        return leaf
    values = np.asarray(leaf, np.float64)
    scale = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    draw = rng.normal(size=values.shape) * (scale or 0.1)
    is_positive = values.size and values.min() > 0
    return jnp.asarray(np.abs(draw) + 0.1 * scale if is_positive else draw, jnp.result_type(leaf))


def _derange(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a permutation without fixed points: one cycle through all positions in random order."""
    cycle = rng.permuted(row, axis=-1)
    moved = np.empty_like(row)
    np.put_along_axis(moved, cycle, np.roll(cycle, -1, axis=-1), axis=-1)
    return moved


def _largest_difference(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """Return the largest difference over all outputs, relative to the largest value of each output."""
    distances = [jnp.zeros(())]
    for x, y in zip(before, after, strict=True):
        if x.size:
            x, y = x.astype(jnp.float64), y.astype(jnp.float64)
            distances.append(
                jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(jnp.float64).tiny)
            )
    return jnp.max(jnp.stack(distances))


def _narrowest_epsilon(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> float:
    """Return the rounding unit of the narrowest floating type in the program: a model may fix its own."""
    closed = jax.make_jaxpr(apply_fn)(params, *inputs)
    results = (var.aval for eqn in iter_equations(closed) for var in eqn.outvars)
    dtypes = {aval.dtype for aval in results if hasattr(aval, "dtype")}
    epsilons = [float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return max([float(jnp.finfo(jnp.float64).eps), *epsilons])
