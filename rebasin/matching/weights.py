"""Weight matching: coordinate ascent over groups by linear assignment.

Algorithm 1 of arXiv 2404.06498 ("Greedy-SOBLAP"; arXiv 2209.04836, algorithm 1), on any spec. The objective
is the inner product ⟨A, P[B]⟩ over all weights, each counted once, so that ‖A − P[B]‖² = ‖A‖² + ‖B‖² −
2·objective.
"""

import time
from collections.abc import Mapping
from typing import Any

import jax

from rebasin.errors import ConfigError
from rebasin.matching.ascent import Ascent
from rebasin.matching.climb import Start, checked_leaves, climb
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, check_permutation, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, is_weight

__all__ = ["Start", "weight_matching"]


def weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    start: Start | Permutation = "depth",
    max_sweeps: int = 100,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B that brings it close to A in Euclidean distance.

    One sweep visits the groups in random order. For group g, with all others fixed, the objective is linear,
    ⟨A, P[B]⟩ = tr(G Pᵀ) + const with G the inner products between units of A and B, and a linear assignment
    solves it exactly. A group whose neighbours have not changed since its last assignment is not solved
    again; sweeps end when none is left. A new permutation is taken only for a gain above the rounding of G,
    so the objective never falls. A group that indexes others, such as the heads of attention, is solved
    together
    with them: its units are paired by the value of the best match of their insides.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      key: PRNG key for the order of groups.
      start: ``"depth"`` makes a first pass over the groups in the order of the network, in which each is
        assigned by those leaves alone whose other axes are already known; if the result is below the identity
        in the objective, the ascent starts at the identity after all. ``"identity"`` is the paper's start. A
        permutation is taken as it is.
      max_sweeps: limit on sweeps, at least 1.
      predicate: ``(path, leaf) -> bool``, the leaves that count; by default floating leaves that are neither
        running statistics nor optimiser state.

    Returns:
      The match; ``stats`` has ``start``, ``assignments``, ``seconds``, and ``seconds_similarity`` and
      ``seconds_assignment`` of them.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes, as networks of different widths do.
      NonFiniteError: a weight is NaN or infinite.
      PermutationError: `start` is a permutation that does not fit.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, 3.0]]), "v": np.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": np.array([[3.0, 1.0, 2.0]]), "v": np.array([[2.0], [1.0], [0.0]])}
      >>> match = weight_matching(spec, a, b, key=jax.random.key(0))
      >>> match.permutation["P0"].tolist(), match.objective.tolist()
      ([1, 2, 0], [19.0, 19.0])
    """
    began = time.perf_counter()
    if max_sweeps < 1:
        raise ConfigError(f"max_sweeps must be at least 1, got {max_sweeps}")
    leaves = checked_leaves(spec, params_a, params_b, predicate)
    ascent = Ascent(spec, [leaves], identity_permutation(spec, params_a))
    if isinstance(start, Mapping):
        check_permutation(spec, params_a, start)
    return climb(ascent, start, key=key, max_sweeps=max_sweeps, began=began)
