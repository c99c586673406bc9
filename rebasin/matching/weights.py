"""Weight matching: coordinate ascent over groups by linear assignment.

Algorithm 1 of arXiv 2404.06498 ("Greedy-SOBLAP"; arXiv 2209.04836, algorithm 1), on any spec. The objective
is the inner product ⟨A, P[B]⟩ over all weights, each counted once, so that ‖A − P[B]‖² = ‖A‖² + ‖B‖² −
2·objective.
"""

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from rebasin.errors import ConfigError, TreeMismatchError
from rebasin.matching.ascent import Ascent
from rebasin.matching.climb import Start, check_options, checked_leaves, climb
from rebasin.matching.kernels import Kernel, check_kernel, kernel_pieces
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, check_permutation, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_same_shapes, is_weight

__all__ = ["Start", "joint_weight_matching", "weight_matching", "weight_matchings"]


def weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    start: Start | Permutation = "depth",
    max_iterations: int = 100,
    restarts: int = 1,
    kernel: Kernel = "inner",
    leaf_weights: Mapping[str, float] | None = None,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B that brings it close to A in Euclidean distance.

    One sweep visits the groups in random order. For group g, with all others fixed, the objective is linear,
    ⟨A, P[B]⟩ = tr(G Pᵀ) + const with G the inner products between units of A and B, and a linear assignment
    solves it exactly. A group whose neighbours have not changed since its last assignment is not solved
    again; sweeps end when none is left. A new permutation is taken only for a gain above the rounding of G,
    so the objective never falls. A group that indexes others, such as the heads of attention, is solved
    together with them: its units are paired by the value of the best match of their insides.

    From ``"depth"``, without restarts, the order of B's units does not matter: permuting B beforehand gives
    the same aligned network, up to ties and rounding, unless the identity has to stand in.

    Where no group has more than four units, the optimum itself is found and returned, however the ascent
    ended, if few enough groups meet (`stats["exact"]`); that counts as one more sweep.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      key: PRNG key for the order of groups.
      start: ``"depth"`` makes a first pass over the groups in the order of the network, in which each is
        assigned by those leaves alone whose other axes are already known; if the ascent from there ends below
        the identity in the objective, it is made from the identity after all. ``"identity"`` is the paper's
        start. A permutation is taken as it is.
      max_iterations: limit on the sweeps of each ascent, at least 1.
      restarts: how often two or three coupled groups, drawn at random, are forgotten, assigned again one
        after the other, and all swept again; the better result is kept. Matrices, similarities and
        compiled programs are shared. More find more: BUILD_NOTES.md has objectives and times.
      kernel: ``"inner"``, or ``"cosine"``: both networks are first rescaled, ŵ = w · Π (scale of each unit
        that w belongs to), so that all weights of every unit together have norm one; then each similarity is
        a cosine, and the objective is ⟨Â, P[B̂]⟩. Units that index others, such as heads, have no scale
        beside that of their insides.
      leaf_weights: a factor of the objective for leaves or subtrees by path name, 1 where none is given; the
        longest name decides, and 0 leaves out.
      predicate: ``(path, leaf) -> bool``, the leaves that count; by default floating leaves that are neither
        running statistics nor optimiser state.

    Returns:
      The match; `objective` goes on through restarts, as the best so far. ``stats`` has ``start``,
      ``sweeps``, ``assignments``, ``certificates`` (groups whose present rows were seen to be optimal
      without one), ``seconds``, and of them ``seconds_layout``, ``seconds_similarity``,
      ``seconds_assignment`` and ``seconds_objective``.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes, as networks of different widths do.
      NonFiniteError: a weight is NaN or infinite.
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option cannot work.

    Examples:
      >>> import numpy as np
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, 3.0]]), "v": np.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": np.array([[3.0, 1.0, 2.0]]), "v": np.array([[2.0], [1.0], [0.0]])}
      >>> match = weight_matching(spec, a, b, key=jax.random.key(0))
      >>> match.permutation["P0"].tolist(), match.objective.tolist()
      ([1, 2, 0], [19.0, 19.0])
    """
    return joint_weight_matching(
        spec,
        [params_a],
        [params_b],
        key=key,
        start=start,
        max_iterations=max_iterations,
        restarts=restarts,
        kernel=kernel,
        leaf_weights=leaf_weights,
        predicate=predicate,
    )


def joint_weight_matching(
    spec: PermutationSpec,
    trees_a: Iterable[Any],
    trees_b: Iterable[Any],
    *,
    key: jax.Array,
    start: Start | Permutation = "depth",
    max_iterations: int = 100,
    restarts: int = 1,
    kernel: Kernel = "inner",
    leaf_weights: Mapping[str, float] | None = None,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """One permutation for two whole sequences of networks, such as two training trajectories.

    Definition 4.3 of arXiv 2404.06498 ("simultaneous") as an algorithm: that of `weight_matching` on the
    objective Σₜ ⟨Aₜ, P[Bₜ]⟩, or with ``kernel="cosine"`` on the sum of those of the rescaled networks, in
    which early networks count as much as late ones whatever their norms.

    Args:
      spec: the symmetries.
      trees_a: networks that stay, at least one.
      trees_b: networks that one permutation moves, as many, each with the leaves, shapes and dtypes of its
        partner. All are held on the host at once.
      key: PRNG key for the order of groups and for restarts.
      start: as in `weight_matching`.
      max_iterations: as in `weight_matching`.
      restarts: as in `weight_matching`.
      kernel: as in `weight_matching`.
      leaf_weights: as in `weight_matching`.
      predicate: as in `weight_matching`.

    Returns:
      The match, as from `weight_matching`.

    Raises:
      TreeMismatchError: the sequences are empty or differ in length, or two partners differ.
    """
    began = time.perf_counter()
    check_options(start, max_iterations, restarts)
    trees_a, trees_b = list(trees_a), list(trees_b)
    if len(trees_a) != len(trees_b) or not trees_a:
        raise TreeMismatchError(
            f"a joint matching needs as many trees of B as of A, at least one; got {len(trees_a)} of A and "
            f"{len(trees_b)} of B"
        )
    identity = None
    pieces = []
    for number, (tree_a, tree_b) in enumerate(zip(trees_a, trees_b, strict=True)):
        many = len(trees_a) > 1
        names = (f"trees_a[{number}]", f"trees_b[{number}]") if many else ("params_a", "params_b")
        if number:
            check_same_shapes(trees_a[0], tree_a, names=("trees_a[0]", names[0]))
        leaves = checked_leaves(spec, tree_a, tree_b, predicate, names)
        check_kernel(kernel, leaf_weights, leaves)
        if identity is None:
            identity = identity_permutation(spec, tree_a)
        pieces += kernel_pieces(spec, leaves, kernel, leaf_weights)
    if isinstance(start, Mapping):
        check_permutation(spec, trees_a[0], start)
    ascent = Ascent(spec, pieces, identity or {})
    return climb(ascent, start, key=key, max_iterations=max_iterations, restarts=restarts, began=began)


def weight_matchings(
    spec: PermutationSpec,
    pairs: Sequence[tuple[Any, Any]],
    *,
    key: jax.Array,
    workers: int | None = None,
    **options: Any,
) -> list[MatchResult]:
    """Many matchings at once: the epochs of a trajectory, replicates, the pairs among many networks.

    They share the compiled products, and the assignments of one run beside the products of another.

    Args:
      spec: the symmetries.
      pairs: A and B of each matching.
      key: PRNG key, the same for each.
      workers: matchings under way at a time, which is also how many networks are held laid out; by default
        one for each processor, at most four.
      **options: those of `weight_matching`.

    Returns:
      What ``weight_matching(spec, a, b, key=key, **options)`` returns for each pair, in their order.

    Raises:
      ConfigError: `workers` is below 1.
    """
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers must be at least 1, got {workers}")
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: weight_matching(spec, *pair, key=key, **options), pairs))
