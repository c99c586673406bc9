"""Activation matching: one linear assignment for each group, on the activations of its units.

Appendix A of arXiv 2404.06498; Li et al. 2015 (arXiv 1511.07543); arXiv 2211.08403 for correlations. The
values that are compared are the activation sites of `rebasin.tracing.sites`.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.axis import cut, iter_blocks
from rebasin.batches import (
    Batches,
    Sum,
    batch_shapes,
    check_counts,
    check_data,
    inputs_of,
    num_examples,
    sum_batches,
)
from rebasin.errors import ConfigError, InferenceError, NonFiniteError, problem_list
from rebasin.inference.programs import bind
from rebasin.matching.assignment import best_inner_match, maximise_assignments
from rebasin.matching.method import Method, build_method, check_networks
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, compiled_permute, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import Program, Static, trace_program
from rebasin.tracing.sites import ActivationSite, find_sites
from rebasin.trees import check_finite

__all__ = ["ActivationMatching", "Measurement", "Similarity", "Sites", "activation_matching", "sum_products"]

Sites: TypeAlias = Literal["last", "all"]
Similarity: TypeAlias = Literal["inner", "correlation"]

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


class Measurement(NamedTuple):
    """All that similarities depend on besides arrays; a static argument of what is compiled."""

    spec: PermutationSpec
    apply_fn: Static
    batches: Batches
    sites: Sites
    similarity: Similarity

    def trace(self, params: Any, inputs: Sequence[Any]) -> Program:
        """Trace the function for parameters and inputs of given shapes."""
        return trace_program(self.spec, self.apply_fn.function, params, *inputs)


class SiteBlock(NamedTuple):
    """A block of an activation site, seen from one of the groups that it carries.

    Attributes:
      group: the group.
      site: the activation site.
      index: the number of the block in the site.
      fixed: labels of dimensions that never move and only serve as an index.
      chain: the outer groups of the group, the group itself, and its inner groups, outermost first.
      foreign: all other groups of the block. They must be aligned before units of this group are compared.
    """

    group: str
    site: ActivationSite
    index: int
    fixed: tuple[str, ...]
    chain: tuple[str, ...]
    foreign: frozenset[str]


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
    blocks = _find_blocks(measurement, params_a, batch_shapes(inputs, measurement.batches.size))
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


def _find_blocks(measurement: Measurement, params: Any, inputs: Sequence[Any]) -> tuple[SiteBlock, ...]:
    """Find the blocks whose similarities add up to that of each group of at least two units."""
    spec = measurement.spec
    groups = [group for group, size in spec.group_sizes(params).items() if np.ravel(size)[-1] > 1]
    sites = find_sites(measurement.trace(params, inputs), groups)
    found = {group: [_blocks_of_site(spec, group, site) for site in sites[group]] for group in groups}
    found = {group: [blocks for blocks in of_group if blocks] for group, of_group in found.items()}
    lost = [f"{group!r}" for group, of_group in found.items() if not of_group]
    if lost:
        advice = "keep them with infer_spec(…, pin=[…]) or match weights"
        raise InferenceError(problem_list(f"no value that depends on the data carries ({advice}):", lost))
    if measurement.sites == "last":
        for group, of_group in found.items():
            alone = [blocks for blocks in of_group if not any(block.foreign for block in blocks)]
            found[group] = (alone or of_group)[-1:]
    return tuple(block for of_group in found.values() for blocks in of_group for block in blocks)


def _blocks_of_site(spec: PermutationSpec, group: str, site: ActivationSite) -> list[SiteBlock]:
    """Return the blocks of a site that carry a group on exactly one axis.

    A block that carries it on two axes, such as a matrix of products between units, says nothing about units
    one by one and is left out.
    """
    outer = spec.outer_groups
    found = []
    for i, block in enumerate(iter_blocks(site.axes, site.shape)):
        labels = block.labels
        if labels.count(group) != 1:
            continue
        chain = [*(o for o in outer.get(group, ()) if o not in spec.fixed), group]
        for inner in spec.outward:
            if labels.count(inner) == 1 and inner not in chain and set(chain) <= set(outer.get(inner, ())):
                chain.append(inner)
        index = itertools.chain.from_iterable(outer.get(name, ()) for name in chain)
        fixed = tuple(dict.fromkeys(name for name in index if name in spec.fixed))
        moving = {name for name in labels if name is not None and name not in spec.fixed}
        found.append(SiteBlock(group, site, i, fixed, tuple(chain), frozenset(moving.difference(chain))))
    return found


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


class PairSums(NamedTuple):
    """Sums over the samples of a block.

    Attributes:
      count: number of samples.
      products: products of units of A and of B, ``[fixed, units, units]``.
      moments: for the correlation, values and their squares in A and in B, ``[fixed, units]`` each.
    """

    count: jax.Array
    products: jax.Array
    moments: tuple[tuple[jax.Array, jax.Array], ...] = ()


@functools.partial(jax.jit, static_argnums=(0, 1))
def sum_products(
    measurement: Measurement, wanted: tuple[int, ...], params_a: Any, params_b: Any, inputs: tuple[Any, ...]
) -> tuple[Sum, tuple[Any, ...]]:
    """Sum over all examples what the similarities of the blocks of numbers `wanted` are made of.

    Returns:
      The sum of a `PairSums` for each block; and for each block what was subtracted from the values of A and
      of B beforehand: for the correlation arrays ``[fixed, 1, units]``, else nothing.
    """

    def samples(batch: tuple[Any, ...]) -> list[tuple[jax.Array, jax.Array]]:
        # The axes of a site depend on the size of the batch: the last, shorter batch has sites of its own.
        blocks = _find_blocks(measurement, params_a, batch)
        closed = measurement.trace(params_a, batch).closed
        a, b = (_samples(closed, [blocks[i] for i in wanted], tree, batch) for tree in (params_a, params_b))
        return list(zip(a, b, strict=True))

    def sums(pair: tuple[jax.Array, jax.Array], shift: tuple[jax.Array, ...]) -> PairSums:
        a, b = (x - first for x, first in zip(pair, shift, strict=True)) if shift else pair
        moments = tuple((jnp.sum(x, axis=1), jnp.sum(jnp.square(x), axis=1)) for x in (a, b) if shift)
        products = lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), precision="highest")
        return PairSums(jnp.asarray(a.shape[1], a.dtype), products, moments)

    shifts: tuple[tuple[jax.Array, ...], ...] = ((),) * len(wanted)
    if measurement.similarity == "correlation":
        # Sums of squares lose a small deviation beside a large mean, so values are shifted by a first guess.
        first = samples(jax.tree.map(lambda x: x[: measurement.batches.size], inputs))
        shifts = tuple(tuple(jnp.mean(x, axis=1, keepdims=True) for x in pair) for pair in first)
    total = sum_batches(lambda batch: tuple(map(sums, samples(batch), shifts)), inputs, measurement.batches)
    return total, shifts


def _samples(closed: Any, blocks: Sequence[SiteBlock], params: Any, inputs: Any) -> list[jax.Array]:
    """Evaluate a network and return the values of blocks as ``[fixed positions, samples, units]``."""

    def hand_out(address: Any, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, Any]:
        results = bind(eqn, operands)
        return results, results

    arguments = [jnp.asarray(x) for x in jax.tree.leaves((params, inputs))]
    _, values = evaluate(closed, arguments, hand_out, dict.fromkeys(block.site.address for block in blocks))
    return [_to_samples(block, values[block.site.address][block.site.output]) for block in blocks]


def _to_samples(block: SiteBlock, value: jax.Array) -> jax.Array:
    """Reshape the values of a block to ``[fixed positions, samples, units]``, real, in float32 at least.

    A complex value counts as two samples. A group of the chain that the value does not carry counts as a
    dimension with a single position.
    """
    place = list(iter_blocks(block.site.axes, block.site.shape))[block.index]
    x = cut(value, place)
    labels: list[str | None] = list(place.labels)
    if jnp.iscomplexobj(x):
        x, labels = jnp.stack([x.real, x.imag]), [None, *labels]
    missing = [name for name in (*block.fixed, *block.chain) if name not in labels]
    x = x.reshape(*x.shape, *(1 for _ in missing))
    labels += missing
    fixed = [labels.index(name) for name in block.fixed]
    units = [labels.index(name) for name in block.chain]
    rest = [i for i in range(x.ndim) if i not in (*fixed, *units)]
    sizes = [math.prod(x.shape[i] for i in part) for part in (fixed, rest, units)]
    x = jnp.transpose(x, (*fixed, *rest, *units)).reshape(sizes)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


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
