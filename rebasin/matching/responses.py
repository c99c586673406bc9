"""Similarities between the units of two networks on the same data, streamed over a split."""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.matching.grams import Term, find_terms, gram, moments, samples
from rebasin.spec import PermutationSpec
from rebasin.tracing.evaluation import bind, evaluate
from rebasin.tracing.program import Static, trace_program
from rebasin.tracing.sites import find_carriers
from rebasin.tracing.streaming import Batches, sum_batches

__all__ = ["Carriers", "Kernel", "Sums", "find_all_terms", "measure", "similarities"]

Carriers = Literal["last", "all"]
Kernel = Literal["inner", "correlation"]

# A unit whose deviation is below this share of its mean is constant: what is left is rounding.
_CONSTANT = 1e-6


def find_all_terms(
    spec: PermutationSpec, function: Static, which: Carriers, groups: tuple[str, ...], tree: Any, batch: Any
) -> dict[str, tuple[Term, ...]]:
    """The terms of each group: of all its carriers, or of the last that carries no foreign group, if any."""
    carriers = find_carriers(trace_program(spec, function.function, tree, batch), groups)
    terms = {}
    for group in groups:
        every = [find_terms(spec, group, carrier) for carrier in carriers[group]]
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
    which: Carriers,
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
        places = {term.carrier.address: None for own in terms.values() for term in own}
        found = []
        for tree in (params_a, params_b):
            inputs = [jnp.asarray(x) for x in jax.tree.leaves((tree, batch))]
            _, values = evaluate(closed, inputs, _hand_out, places)
            found.append(
                {
                    group: [samples(term, values[term.carrier.address][term.carrier.output]) for term in own]
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
