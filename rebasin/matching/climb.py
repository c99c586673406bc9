"""From a start to the end of an ascent: sweeps in random order until nothing is left to improve."""

import time
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from rebasin.errors import ConfigError
from rebasin.matching.ascent import Ascent, Leaves
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, leaf_table

__all__ = ["Start", "checked_leaves", "climb"]

Start: TypeAlias = Literal["depth", "identity"]


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
    tables = []
    for tree, name in zip((params_a, params_b), names, strict=True):
        spec.group_sizes(tree, name=name)
        table = {p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}
        # On the host, where nothing is compiled; the check on the device then says where and how many.
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in table.values()):
            check_finite(table, name)
        tables.append(table)
    a, b = tables
    return {path: (leaf, b[path]) for path, leaf in a.items()}


def climb(
    ascent: Ascent, start: Start | Permutation, *, key: jax.Array, max_sweeps: int, began: float
) -> MatchResult:
    """Sweeps from a start until nothing is left to improve.

    From ``"depth"`` the result is compared with the identity's objective, and where it is below, the ascent
    is made again from there.
    """
    words = np.asarray(jax.random.key_data(key)).ravel().tolist()
    if isinstance(start, Mapping):
        ascent.start({group: np.asarray(start[group]) for group in ascent.identity})
        chosen = "given"
    elif start == "depth":
        ascent.start(ascent.depth_pass())
        chosen = "depth"
    elif start == "identity":
        ascent.start(ascent.identity)
        chosen = "identity"
    else:
        raise ConfigError(f"unknown start {start!r}; known: 'depth', 'identity', or a permutation")
    history = _sweep(ascent, words, max_sweeps)
    if chosen == "depth" and ascent.objective < (floor := ascent.value(ascent.identity)):
        ascent.start(ascent.identity, floor)
        chosen, history = "identity", _sweep(ascent, words, max_sweeps)
    stats = {"start": chosen, "sweeps": len(history) - 1, "seconds": time.perf_counter() - began}
    return MatchResult(
        ascent.permutation,
        np.array(history),
        len(history) - 1,
        not ascent.stale,
        {**stats, **ascent.stats},
    )


def _sweep(ascent: Ascent, words: list[int], max_sweeps: int) -> list[float]:
    """The objective at the start and after each sweep; the order of groups depends on key and sweep alone."""
    history = [ascent.objective]
    while len(history) <= max_sweeps:
        # NumPy's generator: that of JAX would be compiled, which takes longer than most ascents.
        order = np.random.default_rng([*words, len(history)]).permutation(len(ascent.groups))
        ascent.sweep(order.tolist())
        history.append(ascent.objective)
        if not ascent.stale:
            break
    return history
