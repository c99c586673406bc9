"""Inner products between the units of two networks, and the permutations that maximise them.

A *term* is one block of a value that carries a group: its dimensions are the *chain*, which is the groups
that index the group, the group itself, and those that it indexes; *fixed* indices, which stay; and samples,
all the rest. Its Gram matrix holds the inner products over the samples of every unit of A with every unit of
B, a unit being one position of the whole chain, for each position of the fixed indices.
"""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.assignment import maximise_assignment
from rebasin.blocks import cut, iter_blocks
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.tracing.sites import Carrier

__all__ = ["Term", "assign", "best_rows", "find_terms", "gram", "moments", "samples", "value_at"]


class Term(NamedTuple):
    """A block of a carrier, seen from one group.

    Attributes:
      carrier: the value.
      block: which of its blocks.
      fixed: labels of fixed indices.
      chain: labels of outer groups, the group, and inner groups.
      foreign: other groups that the block carries, whose units must already be aligned.
    """

    carrier: Carrier
    block: int
    fixed: tuple[str, ...]
    chain: tuple[str, ...]
    foreign: frozenset[str]


def find_terms(spec: PermutationSpec, group: str, carrier: Carrier) -> tuple[Term, ...]:
    """A group's terms in a carrier; a block that carries it on two axes, as a square does, has none."""
    outer = spec.outer_groups
    terms = []
    for i, block in enumerate(iter_blocks(carrier.axes, carrier.shape)):
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
        terms.append(Term(carrier, i, fixed, tuple(chain), frozenset(moving.difference(chain))))
    return tuple(terms)


def samples(term: Term, value: jax.Array) -> jax.Array:
    """A term's values as ``[fixed positions, samples, units]``, real, in float32 at least.

    Complex values count as two samples, an index of a single position that the value does not carry as one.
    """
    block = list(iter_blocks(term.carrier.axes, term.carrier.shape))[term.block]
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
