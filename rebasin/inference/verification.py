"""Checks numerically that a spec preserves a function: in float64, with random weights and permutations."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from rebasin.errors import InferenceError, VerificationError, problem_list
from rebasin.inference.float64 import Float64Program, as_float64, rewrite_in_float64
from rebasin.permutation import identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, map_leaves, state_leaves

__all__ = ["verify_spec"]

# Sums taken in another order differ by a few roundings. The networks of the tests amplify them by less than
# this factor.
_ROUNDINGS = 1e5

# A spec that is wrong changes the outputs by a tenth or more of their size; a coarser check would pass it.
_COARSEST = 0.1

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

    Every floating or complex leaf is drawn anew, since initial values hide mistakes (zero biases, equal
    scales). The draws are normal with the leaf's own root mean square, or 0.1 where that is zero. They keep
    the sign of a leaf that is positive throughout, as a variance is, or negative throughout; so do the real
    and the imaginary parts of complex leaves. Each group is then permuted by itself, without fixed points,
    and all groups are permuted together at random.

    Everything runs in float64. The function is traced with its own types, and its program is rewritten: a
    model that computes in bfloat16, or that carries float32 through a loop, is checked as exactly as any. An
    operation that cannot be rewritten, such as a callback, makes the check less exact; if it computes in a
    type below float32, nothing can be verified.

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
      InferenceError: the function cannot be traced with these arguments.
      VerificationError: some groups change the outputs (each is named, with the size of the change). Or
        nothing can be verified, since the outputs are not finite or the function insists on a narrow type.
    """
    spec.group_sizes(params)
    key = jax.random.key(0) if key is None else key
    seeds = np.asarray(jax.random.key_data(key)).ravel().tolist()
    changes: dict[str, float] = {}  # the largest over all trials
    closed, output_shapes = _trace(apply_fn, params, inputs)
    leaf_of = state_leaves(state_outputs or {}, output_shapes, params)
    with jax.enable_x64(True):
        program = rewrite_in_float64(closed)
        tolerance = _tolerance(program)
        leaves, structure = jax.tree.flatten((params, inputs))
        types = [var.aval.dtype for var in closed.jaxpr.invars]
        wide = [as_float64(x, dtype) for x, dtype in zip(leaves, types, strict=True)]
        params, inputs = jax.tree.unflatten(structure, wide)
        measure_change = _build_measure_change(
            spec, program, list(leaf_table(output_shapes)), inputs, leaf_of
        )
        identity = identity_permutation(spec, params)
        for trial in range(trials):
            rng = np.random.default_rng([*seeds, trial])
            drawn = jax.tree.map(lambda leaf, rng=rng: _redraw(leaf, rng), params)
            for name, permutation in _permutations(identity, rng):
                change, finite = measure_change(drawn, permutation)
                if not finite:
                    raise VerificationError(
                        "the outputs are not finite for random weights, so nothing can be verified"
                    )
                changes[name] = max(changes.get(name, 0.0), float(change))
    _check_changes(spec, changes, tolerance)


def _trace(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return the closed jaxpr of a function, and the shapes of its outputs."""
    try:
        return jax.make_jaxpr(apply_fn, return_shape=True)(params, *inputs)
    except Exception as error:  # whatever the function raises: Flax has errors of its own
        raise InferenceError(f"the function cannot be traced: {error}") from error


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
    program: Float64Program,
    output_paths: list[str],
    inputs: tuple[Any, ...],
    leaf_of: Mapping[str, str],
) -> Callable[[Any, Any], tuple[jax.Array, jax.Array]]:
    """Build a compiled function: how much a permutation changes the outputs, and whether they are finite."""
    run = core.jaxpr_as_fun(program.closed)

    def evaluate(params: Any, inputs: tuple[Any, ...]) -> dict[str, jax.Array]:
        return dict(zip(output_paths, run(*jax.tree.leaves((params, inputs))), strict=True))

    @jax.jit
    def measure_change(drawn: Any, permutation: Any, inputs: tuple[Any, ...]) -> tuple[jax.Array, jax.Array]:
        before = evaluate(drawn, inputs)
        after = evaluate(permute(spec, permutation, drawn), inputs)
        finite = jnp.all(jnp.array([jnp.all(jnp.isfinite(_numbers(x))) for x in before.values()]))
        # The next state of the permuted network should be the next state of the network, permuted.
        next_values = {leaf: before[path] for path, leaf in leaf_of.items()}
        next_params = map_leaves(lambda path, leaf: next_values.get(path, leaf), drawn)
        moved = leaf_table(permute(spec, permutation, next_params))
        expected = [moved[leaf_of[path]] if path in leaf_of else x for path, x in before.items()]
        return _largest_difference(expected, list(after.values())), finite

    return lambda drawn, permutation: measure_change(drawn, permutation, inputs)


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


def _redraw(leaf: Any, rng: np.random.Generator) -> Any:
    """Draw a floating or complex leaf anew, as `verify_spec` describes; return any other leaf as it is."""
    if jnp.issubdtype(leaf.dtype, jnp.floating):
        return jnp.asarray(_redraw_real(np.asarray(leaf), rng))
    if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return leaf
    values = np.asarray(leaf)
    return jnp.asarray(_redraw_real(np.real(values), rng) + 1j * _redraw_real(np.imag(values), rng))


def _redraw_real(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if not np.isfinite(values).all():
        return values  # a mask whose entries are −inf; other ones would not be finite, or mask nothing
    scale = float(np.sqrt(np.mean(values**2))) if values.size else 0.0
    draw = rng.normal(size=values.shape) * (scale or 0.1)
    if values.size and (values.min() > 0 or values.max() < 0):
        return np.sign(values) * (np.abs(draw) + 0.1 * scale)
    return draw


def _derange(row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draw a permutation without fixed points: one cycle through all positions in random order."""
    cycle = rng.permuted(row, axis=-1)
    moved = np.empty_like(row)
    np.put_along_axis(moved, cycle, np.roll(cycle, -1, axis=-1), axis=-1)
    return moved


def _largest_difference(before: list[jax.Array], after: list[jax.Array]) -> jax.Array:
    """Return the largest difference over all outputs, relative to the largest value of each output."""
    distances = [jnp.zeros(())]
    for x, y in zip(map(_numbers, before), map(_numbers, after), strict=True):
        if x.size:
            size = jnp.maximum(jnp.max(jnp.abs(x)), jnp.finfo(jnp.float64).tiny)
            distances.append(jnp.max(jnp.abs(x - y)) / size)
    return jnp.max(jnp.stack(distances))


def _numbers(x: jax.Array) -> jax.Array:
    """Return the values of an output as numbers that can be subtracted."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(jnp.float64)


def _tolerance(program: Float64Program) -> float:
    """Return the change of the outputs that is taken for rounding; raise if it would hide a wrong spec."""
    narrow = [equation for equation in program.native if _ROUNDINGS * _epsilon(equation.dtype) > _COARSEST]
    if narrow:
        problems = [f"{primitive} cannot run in more than {dtype}" for primitive, dtype in narrow]
        raise VerificationError(
            problem_list("nothing was verified, since rounding would hide a wrong spec:", problems)
        )
    return _ROUNDINGS * max(map(_epsilon, (np.float64, *(equation.dtype for equation in program.native))))


def _epsilon(dtype: Any) -> float:
    return float(jnp.finfo(dtype).eps)
