"""Groups that index others, such as heads: their units are compared by the best match of their insides."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np

from rebasin.matching.blocks import Term
from rebasin.matching.similarity import pair_products
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec

__all__ = ["Insides"]


class Insides:
    """The matches of one inner group for every pair of units of an outer group that indexes it.

    Terms that hold two groups indexed by the outer one have no best match of one of them alone and do not
    count here; whoever takes the result has to compute its gain from the objective.

    Attributes:
      name: the inner group.
      terms: those of the inner group that count.
    """

    def __init__(
        self, spec: PermutationSpec, outer: str, name: str, terms: Sequence[Term], siblings: set[str]
    ) -> None:
        self.outer, self.name = outer, name
        self.terms = [term for term in terms if not siblings.intersection(term.piece.labels)]
        self._index = spec.outer_groups[name]
        self._axis = self._index.index(outer)
        self._above = spec.outer_groups.get(outer, ())

    def match(
        self,
        permutation: Permutation,
        terms: Sequence[Term],
        assign: Callable[[np.ndarray], np.ndarray],
        timed: Callable[[str], AbstractContextManager[None]],
    ) -> tuple[np.ndarray, np.ndarray]:
        """The best match for every pair of outer units.

        Args:
          permutation: rows of the other groups.
          terms: those of `self.terms` that count, at least one.
          assign: solves a stack of assignments.
          timed: counts the seconds of a phase.

        Returns:
          Values ``[index of outer…, n, n]`` of A's outer units and B's, and rows ``[index of inner…, n, m]``,
          in which the axis of `outer` is A's unit and the last but one axis B's.
        """
        with timed("similarity"):
            fixed = {g: row for g, row in permutation.items() if g not in (self.outer, self.name)}
            a = np.concatenate([self._stack(term, term.a) for term in terms], axis=2)
            b = np.concatenate([self._stack(term, term.b[term.sources(fixed)]) for term in terms], axis=2)
        values, rows = [], []
        for unit in range(a.shape[1]):
            with timed("similarity"):
                products = pair_products(a[:, unit], b)
            products = products.reshape(*self._batch(terms[0]), *products.shape[1:])
            matched = assign(products)
            rows.append(matched)
            values.append(np.take_along_axis(products, matched[..., None], axis=-1)[..., 0].sum(axis=-1))
        return self._sum_up(np.stack(values, axis=-2)), np.stack(rows, axis=self._axis)

    def at_pairs(self, matches: np.ndarray, pairs: np.ndarray) -> np.ndarray:
        """Of the matches for all pairs of outer units, those of the pairs chosen.

        Args:
          matches: rows from `match`.
          pairs: B's outer unit for each of A's, ``[index of outer…, n]``.
        """
        shape = [1] * matches.ndim
        for name, size in zip((*self._above, self.outer), pairs.shape, strict=True):
            shape[self._index.index(name)] = size
        return np.take_along_axis(matches, pairs.reshape(shape), axis=-2)[..., 0, :]

    def _batch(self, term: Term) -> tuple[int, ...]:
        return tuple(size for axis, size in enumerate(term.batch) if axis != self._axis)

    def _stack(self, term: Term, matrix: np.ndarray) -> np.ndarray:
        """A term's matrix as ``[batch without outer, outer, k, n]``."""
        blocks = matrix.reshape(*term.batch, -1, matrix.shape[-1])
        blocks = np.moveaxis(blocks, self._axis, len(term.batch) - 1)
        return blocks.reshape(-1, term.batch[self._axis], *blocks.shape[-2:])

    def _sum_up(self, values: np.ndarray) -> np.ndarray:
        """Sums over the part of the index that does not index the outer group itself."""
        names = [name for name in self._index if name != self.outer]
        return values.sum(axis=tuple(i for i, name in enumerate(names) if name not in self._above))
