"""From a start to the end of an ascent: sweeps in random order until nothing is left to improve."""

import time
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import numpy as np

from rebasin.errors import ConfigError
from rebasin.matching.ascent import Ascent
from rebasin.matching.blocks import Leaves
from rebasin.matching.exact import exact_optimum
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, leaf_table

__all__ = ["Start", "check_options", "checked_leaves", "climb"]

Start: TypeAlias = Literal["depth", "identity"]


def check_options(start: Any, max_iterations: int, restarts: int) -> None:
    """Raises `ConfigError` for a start or a number that cannot work."""
    if not isinstance(start, Mapping) and start not in get_args(Start):
        raise ConfigError(f"unknown start {start!r}; known: 'depth', 'identity', or a permutation")
    if max_iterations < 1:
        raise ConfigError(f"max_iterations must be at least 1, got {max_iterations}")
    if restarts < 0:
        raise ConfigError(f"restarts must be at least 0, got {restarts}")


def checked_leaves(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    predicate: LeafPredicate,
    names: tuple[str, str] = ("params_a", "params_b"),
) -> Leaves:
    """The leaves that count of both networks, after all checks.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight is NaN or infinite.
    """
    check_same_shapes(params_a, params_b, names=names)
    spec.group_sizes(params_a, name=names[0])  # and so it fits B
    tables = []
    for tree, name in zip((params_a, params_b), names, strict=True):
        table = {p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}
        # On the host, where nothing is compiled; the check on the device then says where and how many.
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in table.values()):
            check_finite(table, name)
        tables.append(table)
    a, b = tables
    return {path: (leaf, b[path]) for path, leaf in a.items()}


def climb(
    ascent: Ascent,
    start: Start | Permutation,
    *,
    key: jax.Array,
    max_iterations: int,
    restarts: int,
    began: float,
) -> MatchResult:
    """Sweeps from a start until nothing is left to improve, then looks further.

    From ``"depth"`` the result is compared with the identity's objective, and where it is below, the ascent
    is made again from there.
    """
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    if isinstance(start, Mapping):
        ascent.start({group: np.asarray(start[group]) for group in ascent.identity})
        chosen = "given"
    elif start == "depth":
        ascent.start(ascent.reassign())
        chosen = "depth"
    else:
        ascent.start(ascent.identity)
        chosen = "identity"
    history = _sweep(ascent, words, max_iterations)
    if chosen == "depth" and ascent.objective < (floor := ascent.value(ascent.identity)):
        ascent.start(ascent.identity, floor)
        chosen, history = "identity", _sweep(ascent, words, max_iterations)
    for number in range(restarts):
        if ascent.objective >= ascent.bound - 2 * ascent.rounding:
            break  # B is A in another order, and has been put back
        history += _perturb(ascent, [*words, number], max_iterations)
    history += _finish_exactly(ascent)
    stats = {"start": chosen, "sweeps": len(history) - 1, "seconds": time.perf_counter() - began}
    return MatchResult(
        ascent.permutation,
        np.array(history),
        len(history) - 1,
        not ascent.stale,
        {**stats, **ascent.stats},
    )


def _sweep(ascent: Ascent, words: list[int], max_iterations: int) -> list[float]:
    """The objective at the start and after each sweep; the order of groups depends on key and sweep alone."""
    history = [ascent.objective]
    while len(history) <= max_iterations:
        # NumPy's generator: that of JAX would be compiled, which takes longer than most ascents.
        order = np.random.default_rng([*words, len(history)]).permutation(len(ascent.groups))
        ascent.sweep(order.tolist())
        history.append(ascent.objective)
        if not ascent.stale:
            break
    return history


def _perturb(ascent: Ascent, words: list[int], max_iterations: int) -> list[float]:
    """Forgets two or three coupled groups, assigns them in random order, and sweeps again.

    The first is assigned without the others. One alone would be assigned as it was.

    Returns:
      The better objective, once for each sweep made; the ascent stands at the better permutation.
    """
    kept = ascent.permutation, ascent.objective, ascent.stale
    random = np.random.default_rng([*words, 0])
    order = _draw_coupled(ascent, random)
    forgotten = {g for group in order for g in (group, *ascent.inner[group])}
    found = ascent.reassign(order, {g: r for g, r in kept[0].items() if g not in forgotten})
    changed = {g for g in forgotten if not np.array_equal(found[g], kept[0][g])}
    if not changed:
        return []
    ascent.start(found, stale=kept[2].union(changed, *(ascent.neighbours[g] for g in changed)))
    sweeps = len(_sweep(ascent, words, max_iterations)) - 1
    if ascent.objective <= kept[1] + ascent.rounding:
        ascent.permutation, ascent.objective, ascent.stale = kept
    return [ascent.objective] * sweeps


def _draw_coupled(ascent: Ascent, random: np.random.Generator) -> list[str]:
    """Two or three groups that leaves connect, in random order; never three of three."""
    chosen = [ascent.groups[random.integers(len(ascent.groups))]]
    size = 2 if len(ascent.groups) < 4 else random.integers(2, 4)
    while len(chosen) < size:
        near = sorted(set().union(*(ascent.neighbours[g] for g in chosen)).difference(chosen))
        if not near:
            break
        chosen.append(near[random.integers(len(near))])
    return [chosen[i] for i in random.permutation(len(chosen))]


def _finish_exactly(ascent: Ascent) -> list[float]:
    """Goes to the optimum if the groups are so small that it can be found, which counts as one sweep."""
    best = exact_optimum(ascent.pieces, ascent.identity)
    if best is None:
        return []
    ascent.stats["exact"] = True
    value = ascent.value(best)
    if value <= ascent.objective + ascent.rounding:
        return []
    ascent.start(best, value)
    ascent.stale = set()
    return [value]
