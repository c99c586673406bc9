"""Activation matching: one assignment for each group, on the values that carry it.

Appendix A of arXiv 2404.06498; Li et al. 2015 (arXiv 1511.07543); arXiv 2211.08403 for correlations. Sites
values carry a group is defined in `rebasin.tracing.sites`.
"""

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.axis import cut, iter_blocks
from rebasin.batches import Batches, batch_shapes, check_examples, sum_batches
from rebasin.errors import ConfigError, InferenceError, NonFiniteError, problem_list
from rebasin.matching.assignment import maximise_assignment
from rebasin.matching.result import MatchResult
from rebasin.permutation import Permutation, identity_permutation, permute
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import bind, evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import ActivationSite, find_sites
from rebasin.trees import check_finite, check_same_shapes, is_weight, leaf_table

__all__ = [
    "Sites",
    "Kernel",
    "Sums",
    "Term",
    "activation_matching",
    "assign",
    "best_rows",
    "find_all_terms",
    "find_terms",
    "gram",
    "measure",
    "moments",
    "samples",
    "similarities",
    "value_at",
]


class Term(NamedTuple):
    """A block of a site, seen from one group.

    Attributes:
      site: the value.
      block: which of its blocks.
      fixed: labels of fixed indices.
      chain: labels of outer groups, the group, and inner groups.
      foreign: other groups that the block carries, whose units must already be aligned.
    """

    site: ActivationSite
    block: int
    fixed: tuple[str, ...]
    chain: tuple[str, ...]
    foreign: frozenset[str]


def find_terms(spec: PermutationSpec, group: str, site: ActivationSite) -> tuple[Term, ...]:
    """A group's terms in a site; a block that carries it on two axes, as a square does, has none."""
    outer = spec.outer_groups
    terms = []
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
        terms.append(Term(site, i, fixed, tuple(chain), frozenset(moving.difference(chain))))
    return tuple(terms)


def samples(term: Term, value: jax.Array) -> jax.Array:
    """A term's values as ``[fixed positions, samples, units]``, real, in float32 at least.

    Complex values count as two samples, an index of a single position that the value does not carry as one.
    """
    block = list(iter_blocks(term.site.axes, term.site.shape))[term.block]
    x = cut(value, block)
    labels: list[str | None] = list(block.labels)
    if jnp.iscomplexobj(x):
        x, labels = jnp.stack([x.real, x.imag]), [None, *labels]
    missing = [name for name in (*term.fixed, *term.chain) if name not in labels]
    x = x.reshape(*x.shape, *(1 for _ in missing))
    labels += missing
    order = [labels.index(name) for name in term.fixed]
    units = [labels.index(name) for name in term.chain]
    rest = [i for i in range(x.ndim) if i not in (*order, *units)]
    sizes = [math.prod(x.shape[i] for i in part) for part in (order, rest, units)]
    x = jnp.transpose(x, (*order, *rest, *units)).reshape(sizes)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gram(a: jax.Array, b: jax.Array) -> jax.Array:
    """``[fixed, samples, units]`` of A and of B to their inner products, ``[fixed, units, units]``."""
    return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), precision="highest")


def moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums over the samples of ``[fixed, samples, units]``, and of their squares."""
    return jnp.sum(x, axis=1), jnp.sum(jnp.square(x), axis=1)


def best_rows(
    spec: PermutationSpec, group: str, grams: Sequence[tuple[Term, np.ndarray]], permutation: Permutation
) -> np.ndarray:
    """The rows of a group that maximise the sum over its terms, given those of the groups that index it.

    Units of a group that indexes others are paired by the value of the best match of their insides.

    Args:
      spec: the symmetries.
      group: a group.
      grams: its terms with their Gram matrices, ``[fixed positions, units, units]``.
      permutation: rows of the outer groups; those of `group` give the shape.

    Returns:
      Rows of the shape of ``permutation[group]``, int32.
    """
    shape = np.shape(permutation[group])
    names = spec.outer_groups.get(group, ())
    similarity = np.zeros((*shape, shape[-1]))
    for term, values in grams:
        aligned, lead = _align(spec, term, _unfold(spec, term, values, permutation), permutation, group)
        similarity += _for_index(_best_insides(aligned, len(lead)), lead, names)
    return assign(similarity)


def value_at(
    spec: PermutationSpec, grams: Sequence[tuple[Term, np.ndarray]], permutation: Permutation
) -> float:
    """The sum of the terms' inner products between A and the permuted B."""
    total = 0.0
    for term, values in grams:
        unfolded = _unfold(spec, term, values, permutation)
        total += float(_align(spec, term, unfolded, permutation, None)[0].sum())
    return total


def assign(similarity: np.ndarray) -> np.ndarray:
    """An assignment for each matrix of a stack ``[…, n, n]``, int32 ``[…, n]``."""
    matrices = similarity.reshape(-1, *similarity.shape[-2:])
    return np.stack([maximise_assignment(matrix) for matrix in matrices]).reshape(similarity.shape[:-1])


def _unfold(spec: PermutationSpec, term: Term, values: np.ndarray, permutation: Permutation) -> np.ndarray:
    """A Gram matrix as ``[fixed…, chain of A…, chain of B…]``."""
    sizes: dict[str, int] = {}
    for name in term.chain:
        index = (*spec.outer_groups.get(name, ()), name)
        sizes |= dict(zip(index, np.shape(permutation[name]), strict=True))
    fixed, chain = [sizes[name] for name in term.fixed], [sizes[name] for name in term.chain]
    return values.reshape(*fixed, *chain, *chain)


def _align(
    spec: PermutationSpec, term: Term, values: np.ndarray, permutation: Permutation, group: str | None
) -> tuple[np.ndarray, list[str]]:
    """Pairs the units of A and B along the chain, up to `group` or to its end.

    Returns:
      Values ``[fixed…, paired…, rest of A…, rest of B…]``, and the names of the fixed and paired dimensions.
    """
    lead = list(term.fixed)
    paired = term.chain if group is None else term.chain[: term.chain.index(group)]
    for i, name in enumerate(paired):
        index = (*spec.outer_groups.get(name, ()), name)
        rows = np.asarray(permutation[name])
        order = sorted(range(rows.ndim), key=lambda d: (*lead, name).index(index[d]))
        shape = [values.shape[d] if label in index else 1 for d, label in enumerate((*lead, name))]
        rows = rows.transpose(order).reshape(shape)
        at = len(lead)
        values = np.moveaxis(values, at + len(term.chain) - i, at + 1)
        rows = rows.reshape(*rows.shape, *(1 for _ in range(values.ndim - rows.ndim)))
        values = np.take_along_axis(values, rows, axis=at + 1).squeeze(at + 1)
        lead.append(name)
    return values, lead


def _best_insides(values: np.ndarray, num_lead: int) -> np.ndarray:
    """``[lead…, n, inside…, n, inside…]`` to ``[lead…, n, n]``, the values of the best matches inside."""
    depth = (values.ndim - num_lead) // 2
    if depth == 1:
        return values
    # [lead…, n of A, n of B, inside of A…, inside of B…]
    values = np.moveaxis(values, num_lead + depth, num_lead + 1)
    inside = _best_insides(values, num_lead + 2)
    return np.take_along_axis(inside, assign(inside)[..., None], axis=-1)[..., 0].sum(axis=-1)


def _for_index(values: np.ndarray, lead: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """``[lead…, n, n]`` as ``[names…, n, n]``, summed over what is not among the names."""
    values = values.sum(axis=tuple(i for i, name in enumerate(lead) if name not in names))
    kept = [name for name in lead if name in names]
    return values.transpose(*(kept.index(name) for name in names), len(names), len(names) + 1)


Sites = Literal["last", "all"]


Kernel = Literal["inner", "correlation"]


# A unit whose deviation is below this share of its mean is constant: what is left is rounding.
_CONSTANT = 1e-6


def find_all_terms(
    spec: PermutationSpec, function: Static, which: Sites, groups: tuple[str, ...], tree: Any, batch: Any
) -> dict[str, tuple[Term, ...]]:
    """The terms of each group: of all its sites, or of the last that carries no foreign group, if any."""
    sites = find_sites(trace_program(spec, function.function, tree, batch), groups)
    terms = {}
    for group in groups:
        every = [find_terms(spec, group, site) for site in sites[group]]
        every = [own for own in every if own]
        if which == "last":
            alone = [own for own in every if not any(term.foreign for term in own)]
            every = (alone or every)[-1:]
        terms[group] = tuple(term for own in every for term in own)
    return terms


class Sums(NamedTuple):
    """Sums over samples: their number, and for the correlation sums and squares of shifted values."""

    count: jax.Array
    gram: jax.Array
    a: tuple[jax.Array, ...] = ()
    b: tuple[jax.Array, ...] = ()


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def measure(
    spec: PermutationSpec,
    function: Static,
    batches: Batches,
    which: Sites,
    kernel: Kernel,
    wanted: tuple[tuple[str, tuple[int, ...]], ...],
    params_a: Any,
    params_b: Any,
    data: Any,
) -> Any:
    """Sums over the split for each of the terms wanted of each group, and the shifts of the correlation."""

    def both(batch: Any) -> Any:
        """Samples of A and of B for each term."""
        every = find_all_terms(spec, function, which, tuple(group for group, _ in wanted), params_a, batch)
        terms = {group: [every[group][i] for i in indices] for group, indices in wanted}
        closed = trace_program(spec, function.function, params_a, batch).closed
        places = {term.site.address: None for own in terms.values() for term in own}
        found = []
        for tree in (params_a, params_b):
            inputs = [jnp.asarray(x) for x in jax.tree.leaves((tree, batch))]
            _, values = evaluate(closed, inputs, _hand_out, places)
            found.append(
                {
                    group: [samples(term, values[term.site.address][term.site.output]) for term in own]
                    for group, own in terms.items()
                }
            )
        return jax.tree.map(lambda a, b: (a, b), *found)

    def products(batch: Any) -> Any:
        return jax.tree.map(lambda pair: Sums(_count(pair), gram(*pair)), both(batch), is_leaf=_is_pair)

    def products_and_moments(pair: Any, shift: Any) -> Sums:
        a, b = (x - mean for x, mean in zip(pair, shift, strict=True))
        return Sums(_count(pair), gram(a, b), moments(a), moments(b))

    if kernel == "inner":
        return sum_batches(products, data, batches), None
    # Sums of squares lose a small deviation beside a large mean, so values are shifted by a first guess.
    first = both(jax.tree.map(lambda x: jnp.asarray(x)[: batches.size], data))
    shifts = jax.tree.map(lambda x: jnp.mean(x, axis=1, keepdims=True), first)

    def centred(batch: Any) -> Any:
        return jax.tree.map(products_and_moments, both(batch), shifts, is_leaf=_is_pair)

    return sum_batches(centred, data, batches), shifts


def _hand_out(address: Any, eqn: Any, operands: Sequence[Any], extra: Any) -> tuple[Any, Any]:
    results = bind(eqn, operands)
    return results, results


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple)


def _count(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
    return jnp.asarray(pair[0].shape[1], pair[0].dtype)


def similarities(sums: Sums, shifts: Any, kernel: str) -> tuple[np.ndarray, np.ndarray]:
    """Similarities ``[fixed, units, units]`` from float64 sums, and the numbers of constant units."""
    mean_product = np.asarray(sums.gram / sums.count)
    if kernel == "inner":
        return mean_product, np.zeros(2, int)
    means, deviations, constant = [], [], []
    for (total, squares), shift in zip((sums.a, sums.b), shifts, strict=True):
        mean = total / sums.count
        deviation = np.sqrt(np.maximum(squares / sums.count - mean**2, 0))
        silent = deviation <= _CONSTANT * np.abs(mean + np.asarray(shift, np.float64)[:, 0])
        means.append(mean)
        # A silent unit correlates with nothing.
        deviations.append(np.where(silent, np.inf, deviation))
        constant.append(int(silent.sum()))
    covariance = mean_product - means[0][:, :, None] * means[1][:, None, :]
    scale = deviations[0][:, :, None] * deviations[1][:, None, :]
    return np.asarray(covariance / scale), np.array(constant)


def activation_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    function: Callable[[Any, Any], Any],
    data: Any,
    *,
    batch_size: int = 500,
    sites: Sites = "last",
    kernel: Kernel = "inner",
) -> MatchResult:
    """Finds the permutation of B under which its units behave most like A's on the same data.

    For each group, similarity[i, j] is the mean product of unit i of A and unit j of B over all examples and
    positions of the values that carry the group, and one linear assignment maximises its sum. No hooks are
    needed: the function is traced, and its program is run with the values in question as further outputs.

    Units of a group that indexes others, such as heads, are paired by the value of the best match of their
    insides. A group whose sites also carry other groups (as in an MLP-Mixer) waits until those are known,
    and is matched in a further pass over the data, with B permuted so far; where groups wait for each other,
    one is matched by those of its sites that need not wait.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      function: ``(tree, batch) -> outputs``, the function that `spec` was made for.
      data: tree of arrays ``[n, …]`` with one common n; a batch is a slice of it.
      batch_size: examples evaluated at once. The last batch may be shorter. Memory does not depend on n.
      sites: ``"last"`` takes the last site of each group, which is the paper's choice, after the last
        nonlinearity and before pooling or flattening (the last that carries no other group but its indices
        and insides, if there is one); ``"all"`` adds up the similarities of all of them: every block's output
        in a residual stream. `rebasin.tracing.sites` says what a site is.
      kernel: ``"inner"``, the inner product of the paper, which maximised makes the Euclidean distance least;
        or ``"correlation"``, each unit centred and divided by its deviation. Units that are constant over
        the data (dead ones) correlate with nothing.

    Returns:
      The match; its objective is the sum over the groups of the mean similarity of paired units, at the
      start (the identity) and at the end, in units of the kernel. ``stats`` has ``similarity`` (group to its
      share of both), ``constant_units`` (group to their numbers in A and B, for the correlation),
      ``passes`` over the data, ``examples`` and ``seconds``.

    Raises:
      ConfigError: an unknown kernel or choice of sites, or an empty batch.
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
      >>> network = lambda tree, x: jnp.tanh(x @ tree["w"]) @ tree["v"]
      >>> match = activation_matching(spec, a, b, network, np.array([[1.0], [-2.0]]))
      >>> match.permutation["P0"].tolist()
      [1, 2, 0]
    """
    began = time.perf_counter()
    if kernel not in ("inner", "correlation"):
        raise ConfigError(f"unknown kernel {kernel!r}; known: 'inner', 'correlation'")
    if sites not in ("last", "all"):
        raise ConfigError(f"unknown sites {sites!r}; known: 'last', 'all'")
    check_same_shapes(params_a, params_b)
    for tree, name in ((params_a, "params_a"), (params_b, "params_b")):
        spec.group_sizes(tree, name=name)
        check_finite({path: leaf for path, leaf in leaf_table(tree).items() if is_weight(path, leaf)}, name)
    check_examples(data, batch_size)
    check_finite(jax.tree.map(jnp.asarray, data), "data")

    run = _Run(spec, params_a, params_b, Static(function), data, batch_size, sites, kernel)
    permutation, start, end = run.match()
    stats = {
        "similarity": {group: (start[group], end[group]) for group in start},
        "constant_units": run.constant,
        "passes": run.passes,
        "examples": int(np.shape(jax.tree.leaves(data)[0])[0]),
        "seconds": time.perf_counter() - began,
    }
    objective = np.array([sum(start.values()), sum(end.values())])
    return MatchResult(permutation, objective, 1, True, stats)


class _Run:
    """One matching: the terms of every group, and what is known so far."""

    def __init__(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        function: Static,
        data: Any,
        batch_size: int,
        which: Sites,
        kernel: Kernel,
    ) -> None:
        self.spec, self.params_a, self.params_b = spec, params_a, params_b
        self.data, self.kernel = data, kernel
        self.batches = Batches.of(data, batch_size)
        self.measure = functools.partial(measure, spec, function, self.batches, which, kernel)
        self.identity = identity_permutation(spec, params_a)
        shapes = batch_shapes(data, self.batches.size)
        # A group of one unit has nothing to match.
        groups = [group for group in spec.groups if self.identity[group].shape[-1] > 1]
        self.terms = find_all_terms(spec, function, which, tuple(groups), params_a, shapes)
        lost = [f"{group!r}" for group, terms in self.terms.items() if not terms]
        if lost:
            advice = "keep them with infer_spec(…, pin=[…]) or match weights"
            raise InferenceError(problem_list(f"no value that depends on the data carries ({advice}):", lost))
        self.constant: dict[str, tuple[int, int]] = {}
        self.passes = 0

    def match(self) -> tuple[dict[str, np.ndarray], dict[str, float], dict[str, float]]:
        """The permutation, and each group's similarity at the start and at the end."""
        known: dict[str, np.ndarray] = {}
        start: dict[str, float] = {}
        end: dict[str, float] = {}
        while pending := [group for group in self.terms if group not in known]:
            ready = self._ready(pending, known)
            grams = self._grams(ready, self.identity | known)
            found: dict[str, np.ndarray] = {}
            for group in (group for group in self.spec.outward if group in ready):
                # Groups of earlier passes are aligned already.
                found[group] = best_rows(self.spec, group, grams[group], self.identity | found)
            for family in _families(self.spec, tuple(ready)):
                rows = {group: found[group] for group in family}
                before, after = (
                    {g: value_at(self.spec, grams[g], self.identity | move) for g in family}
                    for move in ({}, rows)
                )
                if sum(after.values()) < sum(before.values()):
                    rows, after = {group: self.identity[group] for group in family}, before
                known |= rows
                start |= before
                end |= after
        return self.identity | known, start, end

    def _ready(self, pending: Sequence[str], known: dict[str, np.ndarray]) -> dict[str, list[int]]:
        """The groups to match in the next pass, with the terms that count.

        Those whose neighbours in all their sites are known; else those of which that holds for some of
        them, which then count alone; else the first family as it is.
        """
        usable = {
            group: [
                i
                for i, term in enumerate(self.terms[group])
                if term.foreign & self.terms.keys() <= known.keys()
            ]
            for group in pending
        }
        for wanted in (
            lambda group: len(usable[group]) == len(self.terms[group]),
            lambda group: usable[group],
        ):
            families = [f for f in _families(self.spec, pending) if all(wanted(group) for group in f)]
            if families:
                return {group: usable[group] for family in families for group in family}
        return {group: list(range(len(self.terms[group]))) for group in _families(self.spec, pending)[0]}

    def _grams(
        self, ready: dict[str, list[int]], permutation: dict[str, np.ndarray]
    ) -> dict[str, list[tuple[Term, np.ndarray]]]:
        """Mean products, or correlations, of the units of each term of each group."""
        self.passes += 1
        moved = permute(self.spec, permutation, self.params_b)
        wanted = tuple((group, tuple(indices)) for group, indices in ready.items())
        totals, shifts = jax.device_get(self.measure(wanted, self.params_a, moved, self.data))
        sums = totals.value()
        grams = {}
        for group, indices in ready.items():
            grams[group] = []
            constant = np.zeros(2, int)
            for i, term in enumerate(self.terms[group][j] for j in indices):
                shift = None if shifts is None else shifts[group][i]
                values, silent = similarities(sums[group][i], shift, self.kernel)
                if not np.isfinite(values).all():
                    raise NonFiniteError(
                        f"the values that carry group {group!r} are not finite on these data"
                    )
                grams[group].append((term, values))
                constant += silent
            if self.kernel == "correlation":
                self.constant[group] = (int(constant[0]), int(constant[1]))
        return grams


def _families(spec: PermutationSpec, groups: Sequence[str]) -> list[tuple[str, ...]]:
    """Groups that index each other, together."""
    outer = spec.outer_groups
    families: list[set[str]] = []
    for group in groups:
        family = {group, *(o for o in outer.get(group, ()) if o in groups)}
        for other in [other for other in families if other & family]:
            families.remove(other)
            family |= other
        families.append(family)
    return [tuple(group for group in groups if group in family) for family in families]
