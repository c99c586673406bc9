"""Products of activations of two networks at activation sites, summed over data.

The values that are compared are the activation sites of `rebasin.tracing.sites`.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rebasin.axis import cut, iter_blocks
from rebasin.batches import Batches, Sum, sum_batches
from rebasin.errors import InferenceError, problem_list
from rebasin.inference.programs import bind
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import Program, Static, trace_program
from rebasin.tracing.sites import ActivationSite, find_sites

__all__ = ["Measurement", "PairSums", "Similarity", "SiteBlock", "Sites", "find_blocks", "sum_products"]

Sites: TypeAlias = Literal["last", "all"]
Similarity: TypeAlias = Literal["inner", "correlation"]


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


def find_blocks(measurement: Measurement, params: Any, inputs: Sequence[Any]) -> tuple[SiteBlock, ...]:
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
        blocks = find_blocks(measurement, params_a, batch)
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
