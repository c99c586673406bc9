"""Activation matching: one linear assignment for each group, on the activations of its units.

Appendix A of arXiv 2404.06498; Li et al. 2015 (arXiv 1511.07543); arXiv 2211.08403 for correlations. The
values that are compared are the activation sites of `rebasin.tracing.sites`.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.batches import Batches, batch_shapes, check_counts, check_data, inputs_of, num_examples
from rebasin.errors import ConfigError, NonFiniteError
from rebasin.matching.assignment import best_inner_match, maximise_assignments
from rebasin.matching.method import Method, build_method, check_networks
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.matching.site_products import (
    Measurement,
    PairSums,
    Similarity,
    SiteBlock,
    Sites,
    find_blocks,
    sum_products,
)
from rebasin.permutation import Permutation, compiled_permute, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.tracing.program import Static
from rebasin.trees import check_finite

__all__ = ["ActivationMatching", "activation_matching"]

# A unit whose deviation is below this share of its mean is constant: what is left is rounding.
_CONSTANT = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class ActivationMatching(Method):
    """Activation matching, together with its options.

    Attributes:
      batch_size: number of examples that are evaluated at once. The last batch may be shorter. Memory does
        not depend on the number of all examples.
      sites: ``"last"`` takes the last activation site of each group, which is the paper's choice: after the
        last nonlinearity and before pooling or flattening. If some sites carry no other group than the outer
        and inner groups of this one, it is the last of those. ``"all"`` adds up the similarities of all sites
        of a group, such as the outputs of all blocks of a residual stream.
      similarity: ``"inner"`` is the inner product of the paper; its maximum is the least Euclidean distance
        between activations. ``"correlation"`` centres each unit and divides it by its standard deviation.
        Units that are constant over the data, such as dead ones, then correlate with nothing.
      roles: as in `Method`; weights must be finite.
    """

    name: ClassVar[str] = "activations"
    objective: ClassVar[str] = "Σ of paired units' mean products over the data"

    batch_size: int = 500
    sites: Sites = "last"
    similarity: Similarity = "inner"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity not in ("inner", "correlation"):
            raise ConfigError(f"unknown similarity {self.similarity!r}; known: 'inner', 'correlation'")
        if self.sites not in ("last", "all"):
            raise ConfigError(f"unknown sites {self.sites!r}; known: 'last', 'all'")
        check_counts(1, batch_size=self.batch_size)

    @property
    def needs(self) -> tuple[str, ...]:
        """The network as a function, and data."""
        return ("apply_fn", "data")

    def _match(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, report: Reporter, **needed: Any
    ) -> MatchResult:
        began = time.perf_counter()
        networks = {"params_a": params_a, "params_b": params_b}
        params_a, params_b = check_networks(spec, networks, self.roles, by_weights=False).trees
        check_data(needed["data"], self.batch_size)
        inputs = jax.tree.map(jnp.asarray, inputs_of(needed["data"]))
        check_finite(inputs, "data")
        batches = Batches.of(inputs, self.batch_size)
        measurement = Measurement(spec, Static(needed["apply_fn"]), batches, self.sites, self.similarity)
        matched, passes = _match_groups(measurement, params_a, params_b, inputs, report)
        stats = {
            "similarity": {group: (own.start, own.end) for group, own in matched.items()},
            "constant_units": {g: m.constant for g, m in matched.items() if self.similarity == "correlation"},
            "passes": passes,
            "examples": num_examples(inputs),
            "seconds": time.perf_counter() - began,
        }
        objective = [sum(own.start for own in matched.values()), sum(own.end for own in matched.values())]
        permutation = identity_permutation(spec, params_b) | {g: own.rows for g, own in matched.items()}
        return MatchResult(permutation, np.array(objective, np.float64), 1, True, stats)


def activation_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    apply_fn: Callable[..., Any],
    data: Any,
    *,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find the permutation of B under which its units behave most like A's on the same data.

    For each group, similarity[i, j] is the mean product of unit i of A and unit j of B over all examples and
    positions of the values that carry the group. One linear assignment maximises the sum over paired units.
    The model needs no hooks: these values are further outputs of the traced function.

    Units of an outer group, such as heads, are paired by the value of the best match of their inner units.
    If the sites of a group also carry other groups, as in an MLP-Mixer, it is matched once those are, in a
    further pass over the data, with B permuted so far. Where groups wait for each other, one of them is
    matched by those of its sites that need not wait.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
      data: a `rebasin.Batch`, whose labels are ignored, or its inputs alone, arrays ``[n, …]``.
      progress: called after each pass over the data and at the end, as in `Method.match`.
      **options: the fields of `ActivationMatching`.

    Returns:
      The match. Its objective is the sum over all groups of the similarities of paired units, at the start
      (the identity) and at the end. ``stats`` has ``similarity`` (each group's share of both values),
      ``constant_units`` (the numbers of constant units of each group in A and in B, for the correlation),
      ``passes`` (over the data), ``examples`` and ``seconds``.

    Raises:
      ConfigError: an option cannot work.
      DataError: the data are empty, or of different lengths.
      InferenceError: the function cannot be traced with such a batch, allows less than `spec`, or has groups
        that no value carries.
      NonFiniteError: a leaf, an input or a similarity is NaN or infinite.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.

    Examples:
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
      >>> a = {"w": np.array([[1.0, 2.0, -3.0]]), "v": np.ones((3, 1))}
      >>> b = {"w": np.array([[-3.0, 1.0, 2.0]]), "v": np.ones((3, 1))}
      >>> network = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]
      >>> match = activation_matching(spec, a, b, network, np.array([[1.0], [-2.0]]))
      >>> match.permutation["P0"].tolist()
      [1, 2, 0]
    """
    method = build_method(ActivationMatching, options)
    return method.match(spec, params_a, params_b, apply_fn=apply_fn, data=data, progress=progress)


class Measured(NamedTuple):
    """A block with its similarities ``[fixed positions, units of A, units of B]``, and constant units.

    A unit of a block is a combination of units of all groups of the chain. `constant` holds the numbers of
    constant units in A and in B; it is zero unless correlations are measured.
    """

    block: SiteBlock
    values: np.ndarray
    constant: np.ndarray


class Matched(NamedTuple):
    """The rows of a group, its similarity under the identity and under these rows, and constant units."""

    rows: np.ndarray
    start: float
    end: float
    constant: tuple[int, ...]


def _match_groups(
    measurement: Measurement, params_a: Any, params_b: Any, inputs: tuple[Any, ...], report: Reporter
) -> tuple[dict[str, Matched], int]:
    """Match every group of at least two units; return the groups and the number of passes over the data."""
    spec = measurement.spec
    identity = identity_permutation(spec, params_a)
    blocks = find_blocks(measurement, params_a, batch_shapes(inputs, measurement.batches.size))
    matched: dict[str, Matched] = {}
    passes = 0
    while pending := list(dict.fromkeys(b.group for b in blocks if b.group not in matched)):
        passes += 1
        wanted = _choose_blocks(blocks, _families(spec, pending))
        rows = identity | {group: own.rows for group, own in matched.items()}
        moved = compiled_permute(spec, rows, params_b)
        sums, shifts = jax.device_get(sum_products(measurement, wanted, params_a, moved, inputs))
        measured = [
            _compare(blocks[i], own, shift)
            for i, own, shift in zip(wanted, sums.value(), shifts, strict=True)
        ]
        for family in _families(spec, list(dict.fromkeys(one.block.group for one in measured))):
            matched |= _match_family(spec, family, measured, identity)
        report("pass", passes, None)
    return matched, passes


def _families(spec: PermutationSpec, groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Gather groups with their outer and inner groups, which have to be matched in the same pass."""
    outer = spec.outer_groups
    families: list[set[str]] = []
    for group in groups:
        family = {group, *(o for o in outer.get(group, ()) if o in groups)}
        for other in [other for other in families if other & family]:
            families.remove(other)
            family |= other
        families.append(family)
    return [tuple(group for group in groups if group in family) for family in families]


def _choose_blocks(blocks: Sequence[SiteBlock], families: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """Choose the blocks that are measured in the next pass over the data.

    A block is usable once every other group that it carries is matched. Families are matched if all their
    blocks are usable. If there are no such families, those in which every group has some usable block are
    matched by these alone. If there are none of those either, the first family is matched by all its blocks.
    The result holds the numbers of the chosen blocks.
    """
    waiting = set(itertools.chain.from_iterable(families))
    numbers = {group: [i for i, block in enumerate(blocks) if block.group == group] for group in waiting}
    usable = {group: [i for i in own if not blocks[i].foreign & waiting] for group, own in numbers.items()}
    chosen = [f for f in families if all(usable[group] == numbers[group] for group in f)]
    chosen = chosen or [f for f in families if all(usable[group] for group in f)]
    if not chosen:
        chosen, usable = families[:1], numbers
    return tuple(i for family in chosen for group in family for i in usable[group])


def _compare(block: SiteBlock, sums: PairSums, shift: tuple[np.ndarray, ...]) -> Measured:
    """Compute the similarities of a block from its sums, on the host in float64."""
    values, constant = np.asarray(sums.products / sums.count), np.zeros(2, int)
    if sums.moments:
        means, deviations = [], []
        for i, ((total, squares), first) in enumerate(zip(sums.moments, shift, strict=True)):
            mean = total / sums.count
            deviation = np.sqrt(np.maximum(squares / sums.count - mean**2, 0))
            silent = deviation <= _CONSTANT * np.abs(mean + np.asarray(first, np.float64)[:, 0])
            constant[i] = silent.sum()
            means.append(mean)
            # An infinite deviation makes every correlation of the unit zero.
            deviations.append(np.where(silent, np.inf, deviation))
        covariance = values - means[0][:, :, None] * means[1][:, None, :]
        values = covariance / (deviations[0][:, :, None] * deviations[1][:, None, :])
    if not np.isfinite(values).all():
        raise NonFiniteError(f"the values that carry group {block.group!r} are not finite on these data")
    return Measured(block, values, constant)


def _match_family(
    spec: PermutationSpec, family: Sequence[str], measured: Sequence[Measured], identity: Permutation
) -> dict[str, Matched]:
    """Match groups that depend on each other, outer groups first; keep the identity where it is better."""
    of_group = {group: [one for one in measured if one.block.group == group] for group in family}
    rows: dict[str, np.ndarray] = {}
    for group in (group for group in spec.outward if group in family):
        # Groups of earlier passes are aligned already: their rows are the identity here.
        rows[group] = _best_rows(spec, group, of_group[group], {**identity, **rows})

    def similarity(group: str, permutation: Permutation) -> float:
        paired = (_pair_units(spec, one, permutation, one.block.chain) for one in of_group[group])
        return sum((float(values.sum()) for values in paired), 0.0)

    start = {group: similarity(group, identity) for group in family}
    end = {group: similarity(group, {**identity, **rows}) for group in family}
    if sum(end.values()) < sum(start.values()):
        rows, end = {group: identity[group] for group in family}, start
    constant = {g: np.sum([one.constant for one in own], axis=0) for g, own in of_group.items()}
    return {g: Matched(rows[g], start[g], end[g], tuple(constant[g].tolist())) for g in family}


def _best_rows(
    spec: PermutationSpec, group: str, measured: Sequence[Measured], permutation: Permutation
) -> np.ndarray:
    """Return the rows of a group that maximise its similarity, given the rows of its outer groups."""
    shape = np.shape(permutation[group])
    outer = spec.outer_groups.get(group, ())
    total = np.zeros((*shape, shape[-1]))
    for one in measured:
        paired = one.block.chain[: one.block.chain.index(group)]
        names = [*one.block.fixed, *paired]
        values = _match_inner(_pair_units(spec, one, permutation, paired), len(names))
        # Sum over the dimensions on which the rows of the group do not depend.
        values = values.sum(axis=tuple(i for i, name in enumerate(names) if name not in outer))
        kept = [name for name in names if name in outer]
        total += values.transpose(*(kept.index(name) for name in outer), len(outer), len(outer) + 1)
    return maximise_assignments(total)


def _pair_units(
    spec: PermutationSpec, measured: Measured, permutation: Permutation, paired: Sequence[str]
) -> np.ndarray:
    """Keep, of all pairs of units, those that a permutation pairs, for the first groups of the chain.

    Rows of the other groups of the chain do not count. The result has the dimensions ``[fixed…, paired…, rest
    of the chain in A…, rest of the chain in B…]``.
    """
    chain, labels = measured.block.chain, (*measured.block.fixed, *measured.block.chain)
    index = {name: (*spec.outer_groups.get(name, ()), name) for name in chain}
    sizes: dict[str, int] = {}
    for name in chain:
        sizes |= dict(zip(index[name], np.shape(permutation[name]), strict=True))
    values = measured.values.reshape([sizes[label] for label in (*labels, *chain)])
    if not paired:
        return values
    rest = chain[len(paired) :]
    positions = np.ix_(*(np.arange(sizes[label]) for label in (*labels, *rest)))
    in_a = dict(zip(labels, positions[: len(labels)], strict=True))
    in_b = dict(zip(rest, positions[len(labels) :], strict=True))
    for name in paired:
        in_b[name] = np.asarray(permutation[name])[tuple(in_a[label] for label in index[name])]
    return values[(*in_a.values(), *(in_b[name] for name in chain))]


def _match_inner(values: np.ndarray, num_paired: int) -> np.ndarray:
    """Turn ``[paired…, n, inner…, n, inner…]`` into ``[paired…, n, n]``: values of the best inner matches."""
    depth = (values.ndim - num_paired) // 2
    if depth == 1:
        return values
    # To [paired…, n of A, n of B, inner of A…, inner of B…].
    values = np.moveaxis(values, num_paired + depth, num_paired + 1)
    return best_inner_match(_match_inner(values, num_paired + 2))[1]
