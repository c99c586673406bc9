"""Weight matching: coordinate ascent over groups by linear assignment.

Algorithm 1 of arXiv 2404.06498 ("Greedy-SOBLAP"; arXiv 2209.04836, algorithm 1), on any spec. The objective
is the inner product ⟨A, P[B]⟩ over all weights, each counted once, so ‖A − P[B]‖² = ‖A‖² + ‖B‖² −
2·objective, and the distance falls as the objective rises.
"""

import dataclasses
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import jax
import numpy as np

from rebasin.batches import check_counts
from rebasin.errors import ConfigError, TreeMismatchError, problem_list
from rebasin.matching.ascent import (
    Problem,
    State,
    Work,
    assign_in_order,
    improve,
    lay_out,
    objective_of,
    state_at,
)
from rebasin.matching.blocks import LeafPairs, PairBlock, pair_blocks
from rebasin.matching.method import Method, build_method, check_spec_and_key, check_start, comparable_weights
from rebasin.matching.progress import ProgressFn, Reporter, report_end
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, check_permutation, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import check_finite, check_same_shapes, is_below, leaf_table

__all__ = ["AscentStart", "WeightMatching", "joint_weight_matching", "weight_matching", "weight_matchings"]

AscentStart: TypeAlias = Literal["depth", "identity"]

# Products of weights so small that they sum up to less than this would underflow in float32, and products as
# much above one would overflow: such networks are rescaled first.
_SMALLEST = 1e-24


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class WeightMatching(Method):
    """Weight matching, with its options.

    Attributes:
      start: where the ascent starts. ``"depth"`` is a first pass over the groups in the order of the network,
        in which each group is assigned by those leaves alone whose other axes are already known; if the
        ascent from there ends below the identity's objective, it is made again from the identity.
        ``"identity"`` is the paper's start. A permutation is taken as it is (and, being a mapping, leaves the
        method without a hash).
      max_iterations: limit on the iterations of each ascent, at least 1.
      restarts: how often two or three coupled groups, drawn at random, are assigned anew without regard to
        their present permutations, and the ascent goes on from there; the better result is kept. More
        restarts find more: benchmarks/RESULTS.md has objectives and times.
      leaf_weights: factors of leaves or of whole subtrees in the objective, by path name; of the names that a
        leaf lies below the longest decides, and a leaf without a name counts once. Weight 0 leaves a leaf
        out.
      roles: as in `Method`; only weights count.

    Raises:
      ConfigError: an option cannot work.

    Examples:
      >>> WeightMatching(restarts=3).restarts, WeightMatching() == WeightMatching(start="depth")
      (3, True)
    """

    name: ClassVar[str] = "weights"
    objective: ClassVar[str] = "⟨A, P[B]⟩"

    start: AscentStart | Permutation = "depth"
    max_iterations: int = 100
    restarts: int = 1
    leaf_weights: Mapping[str, float] | tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_start(self.start, get_args(AscentStart))
        check_counts(1, max_iterations=self.max_iterations)
        check_counts(0, restarts=self.restarts)
        weights = dict(self.leaf_weights)
        object.__setattr__(self, "leaf_weights", tuple(weights.items()))  # pairs, unlike a dict, have a hash
        problems = [
            f"{name!r} has weight {weight}, wanted a finite one of at least 0"
            for name, weight in weights.items()
            if not (np.isfinite(weight) and weight >= 0)
        ]
        if problems:
            raise ConfigError(problem_list("leaf_weights cannot work:", problems))

    @property
    def needs(self) -> tuple[str, ...]:
        """A PRNG key, for the order of groups and for restarts."""
        return ("key",)

    def _match(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, report: Reporter, **needed: Any
    ) -> MatchResult:
        return self._match_all(spec, [params_a], [params_b], report, needed["key"])

    def match_jointly(
        self,
        spec: PermutationSpec,
        trees_a: Sequence[Any],
        trees_b: Sequence[Any],
        *,
        key: jax.Array,
        progress: ProgressFn | None = None,
    ) -> MatchResult:
        """Find one permutation for two sequences of networks; see `joint_weight_matching`."""
        check_spec_and_key(spec, key)
        match = self._match_all(spec, trees_a, trees_b, Reporter(self.name, progress), key)
        return report_end(self.name, progress, match)

    def _match_all(
        self,
        spec: PermutationSpec,
        trees_a: Sequence[Any],
        trees_b: Sequence[Any],
        report: Reporter,
        key: jax.Array,
    ) -> MatchResult:
        began = time.perf_counter()
        blocks = _check_and_cut(self, spec, trees_a, trees_b)
        work = Work()
        with work.timed("layout"):
            identity = identity_permutation(spec, trees_a[0])
            problem, scale = lay_out(spec, blocks, identity), 1.0
            if not _SMALLEST < problem.bound < 1 / _SMALLEST:
                blocks, scale = _rescaled(blocks)
                problem = lay_out(spec, blocks, identity)
        seed = np.asarray(jax.random.key_data(key)).ravel().tolist()
        report = dataclasses.replace(report, scale=scale)
        state, history, chosen = _ascend(self, problem, work, seed, report)
        for number in range(self.restarts):
            if state.objective >= problem.bound - 2 * problem.rounding:
                break  # B is A in another order, and has been put back
            state, iterations = _restart(self, problem, work, state, [*seed, number], report)
            history += [state.objective] * iterations
        stats = {
            "start": chosen,
            "iterations": len(history) - 1,
            "assignments": work.assignments,
            "certificates": work.certificates,
            "seconds": time.perf_counter() - began,
            **{f"seconds_{part}": seconds for part, seconds in work.seconds.items()},
        }
        values = np.array(history) * scale
        return MatchResult(state.permutation, values, len(history) - 1, not state.stale, stats)


def weight_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    *,
    key: jax.Array,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B that brings it close to A in Euclidean distance.

    One iteration visits the groups in random order. For group g, with all others fixed, the objective is
    linear, ⟨A, P[B]⟩ = tr(S Pᵀ) + const with S the inner products between units of A and of B, and a linear
    assignment solves it exactly. A group whose neighbours have not changed since its last assignment is not
    solved again; the ascent ends when none is left. A new permutation is taken only for a gain above the
    rounding error of S, so the objective never falls. An outer group, such as the heads of attention, is
    solved together with its inner groups, to any depth: its units are paired by the value of their best inner
    match.

    From ``start="depth"``, without restarts, the order of B's units does not matter: permuting B beforehand
    gives the same aligned network, up to ties and rounding, unless the identity has to stand in.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      key: PRNG key for the order of groups and for restarts.
      progress: called after each iteration and at the end, as in `Method.match`.
      **options: the fields of `WeightMatching`.

    Returns:
      The match; `objective` goes on through restarts, as the best so far. ``stats`` has ``start``,
      ``iterations``, ``assignments``, ``certificates`` (groups whose present permutation was seen to be
      optimal without an assignment), ``seconds``, and of them ``seconds_layout``, ``seconds_similarity``,
      ``seconds_assignment`` and ``seconds_objective``.

    Raises:
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes, as networks of different widths do.
      NonFiniteError: a weight is NaN or infinite.
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option is unknown or cannot work.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, 3.0]]), "v": np.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": np.array([[3.0, 1.0, 2.0]]), "v": np.array([[2.0], [1.0], [0.0]])}
      >>> match = weight_matching(spec, a, b, key=jax.random.key(0))
      >>> match.permutation["P0"].tolist(), match.objective.tolist()
      ([1, 2, 0], [19.0, 19.0])
    """
    method = build_method(WeightMatching, options)
    return method.match(spec, params_a, params_b, key=key, progress=progress)


def joint_weight_matching(
    spec: PermutationSpec,
    trees_a: Iterable[Any],
    trees_b: Iterable[Any],
    *,
    key: jax.Array,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find one permutation for two whole sequences of networks, such as two training trajectories.

    Definition 4.3 of arXiv 2404.06498 ("simultaneous") as an algorithm: that of `weight_matching` on the
    objective Σₜ ⟨Aₜ, P[Bₜ]⟩.

    Args:
      spec: the symmetries.
      trees_a: networks that stay, at least one.
      trees_b: networks that one permutation moves, as many, each with the leaves, shapes and dtypes of its
        partner. All are held on the host at once.
      key: PRNG key for the order of groups and for restarts.
      progress: called after each iteration and at the end, as in `Method.match`.
      **options: the fields of `WeightMatching`.

    Returns:
      The match, as from `weight_matching`.

    Raises:
      TreeMismatchError: the sequences are empty or differ in length, or two partners differ.
    """
    method = build_method(WeightMatching, options)
    return method.match_jointly(spec, list(trees_a), list(trees_b), key=key, progress=progress)


def weight_matchings(
    spec: PermutationSpec,
    pairs: Sequence[tuple[Any, Any]],
    *,
    key: jax.Array,
    workers: int | None = None,
    **options: Any,
) -> list[MatchResult]:
    """Match many pairs at once: the epochs of a trajectory, replicates, or the pairs among many networks.

    They share compiled products, and the assignments of one run beside the products of another.

    Args:
      spec: the symmetries.
      pairs: A and B of each matching.
      key: PRNG key, the same for each matching.
      workers: number of matchings under way at a time, and so of pairs laid out in memory; by default one for
        each processor, at most four.
      **options: the fields of `WeightMatching`.

    Returns:
      What ``weight_matching(spec, a, b, key=key, **options)`` returns for each pair, in their order.

    Raises:
      ConfigError: `workers` is below 1, or an option cannot work.
    """
    workers = min(4, os.cpu_count() or 1) if workers is None else workers
    check_counts(1, workers=workers)
    method = build_method(WeightMatching, options)
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: method.match(spec, *pair, key=key), pairs))


def _check_and_cut(
    method: WeightMatching, spec: PermutationSpec, trees_a: Sequence[Any], trees_b: Sequence[Any]
) -> list[PairBlock]:
    """Check the networks, and return the blocks of all pairs."""
    if len(trees_a) != len(trees_b) or not trees_a:
        raise TreeMismatchError(
            f"a joint matching needs as many trees of B as of A, at least one; got {len(trees_a)} of A and "
            f"{len(trees_b)} of B"
        )
    blocks: list[PairBlock] = []
    for number, (params_a, params_b) in enumerate(zip(trees_a, trees_b, strict=True)):
        many = len(trees_a) > 1
        names = (f"trees_a[{number}]", f"trees_b[{number}]") if many else ("params_a", "params_b")
        if number:
            check_same_shapes(trees_a[0], params_a, names=("trees_a[0]", names[0]))
        leaves = _check_pair(method, spec, params_a, params_b, names)
        blocks += pair_blocks(spec, leaves, dict(method.leaf_weights))
    if isinstance(method.start, Mapping):
        check_permutation(spec, trees_a[0], method.start)
    return blocks


def _rescaled(blocks: Sequence[PairBlock]) -> tuple[list[PairBlock], float]:
    """Scale both networks by powers of two, which is exact, so that the largest weight of each is about one.

    Returns:
      The scaled blocks, and the number by which their objective has to be multiplied.
    """
    sides = [[block.a for block in blocks], [block.b for block in blocks]]
    largest = [max((float(np.abs(x).max()) for x in side if x.size), default=0.0) for side in sides]
    exponents = [-int(np.frexp(value)[1]) for value in largest]
    scaled = [
        block._replace(a=np.ldexp(block.a, exponents[0]), b=np.ldexp(block.b, exponents[1]))
        for block in blocks
    ]
    return scaled, 2.0 ** -sum(exponents)


def _check_pair(
    method: WeightMatching, spec: PermutationSpec, params_a: Any, params_b: Any, names: tuple[str, str]
) -> LeafPairs:
    """Return the leaves that count of both networks, after all checks."""
    check_same_shapes(params_a, params_b, names=names)
    spec.group_sizes(params_a, name=names[0])  # and so it fits B
    weights = comparable_weights(spec, params_a, method.roles, names[0])
    tables = []
    for tree, name in zip((params_a, params_b), names, strict=True):
        table = {p: leaf for p, leaf in leaf_table(tree).items() if p in weights}
        # On the host, where nothing is compiled; the check on the device then says where and how many.
        if not all(np.isfinite(np.asarray(leaf)).all() for leaf in table.values()):
            check_finite(tree, name, leaves=weights)
        tables.append(table)
    a, b = tables
    unknown = [
        f"{name!r} names no leaf that counts"
        for name, _ in method.leaf_weights
        if not any(is_below(path, name) for path in a)
    ]
    if unknown:
        raise ConfigError(problem_list("leaf_weights cannot work:", unknown))
    return {path: (leaf, b[path]) for path, leaf in a.items()}


def _ascend(
    method: WeightMatching, problem: Problem, work: Work, seed: list[int], report: Reporter
) -> tuple[State, list[float], str]:
    """Return the end of the first ascent, its objectives from the start on, and where it started."""
    if isinstance(method.start, Mapping):
        chosen = "given"
        first = {group: np.asarray(method.start[group]) for group in problem.groups}
    elif method.start == "depth":
        chosen, first = "depth", assign_in_order(problem, work)
    else:
        chosen, first = "identity", problem.identity
    begin = state_at(problem, work, first)
    state, history = _iterate(method, problem, work, begin, seed, report)
    if chosen == "depth" and state.objective < objective_of(problem, work, problem.identity):
        chosen, begin = "identity", state_at(problem, work, problem.identity)
        state, history = _iterate(method, problem, work, begin, seed, report)
    return state, [begin.objective, *history], chosen


def _iterate(
    method: WeightMatching,
    problem: Problem,
    work: Work,
    state: State,
    seed: list[int],
    report: Reporter,
    *,
    stage: str = "ascent",
    least: float = -np.inf,
) -> tuple[State, list[float]]:
    """Iterate until no group is stale; the order of groups depends on the seed and the iteration alone.

    The report is of the objective that is reached, or of `least` if that is higher.

    Returns:
      The last state, and the objective after each iteration.
    """
    history: list[float] = []
    while len(history) < method.max_iterations:
        # NumPy's generator: that of JAX would be compiled, which takes longer than most ascents.
        order = np.random.default_rng([*seed, len(history) + 1]).permutation(len(problem.groups))
        for group in (problem.groups[i] for i in order):
            state = improve(problem, work, state, group)
        history.append(state.objective)
        report(stage, len(history), method.max_iterations, max(state.objective, least))
        if not state.stale:
            break
    return state, history


def _restart(
    method: WeightMatching, problem: Problem, work: Work, state: State, seed: list[int], report: Reporter
) -> tuple[State, int]:
    """Assign two or three coupled groups anew, in random order, and iterate from there.

    The first of them is assigned without regard to the others; a single group would be assigned as it was.

    Returns:
      The better of the two states, and the number of iterations made.
    """
    order = _draw_coupled(problem, np.random.default_rng([*seed, 0]))
    free = {g for group in order for g in (group, *problem.inner_names[group])}
    known = {g: rows for g, rows in state.permutation.items() if g not in free}
    found = assign_in_order(problem, work, order, known)
    changed = {group for group in free if not np.array_equal(found[group], state.permutation[group])}
    if not changed:
        return state, 0
    stale = state.stale.union(changed, *(problem.neighbours[group] for group in changed))
    begin = state_at(problem, work, found)._replace(stale=stale)
    stage = f"restart {seed[-1] + 1}"
    end, history = _iterate(method, problem, work, begin, seed, report, stage=stage, least=state.objective)
    return end if end.objective > state.objective + problem.rounding else state, len(history)


def _draw_coupled(problem: Problem, random: np.random.Generator) -> list[str]:
    """Pick two or three groups that share leaves, in random order; only two if there are fewer than four."""
    groups = problem.groups
    chosen = [groups[random.integers(len(groups))]]
    size = 2 if len(groups) < 4 else random.integers(2, 4)
    while len(chosen) < size:
        near = sorted(set().union(*(problem.neighbours[g] for g in chosen)).difference(chosen))
        if not near:
            break
        chosen.append(near[random.integers(len(near))])
    return [chosen[i] for i in random.permutation(len(chosen))]
