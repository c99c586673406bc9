"""Similarities between the units of two networks, kept up to date as permutations change."""

import collections
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax import lax

from rebasin.matching.blocks import Term
from rebasin.permutation import Permutation

__all__ = ["Similarity", "pair_products"]

# The rows of A and B are multiplied in panels of this many values, and at least this many rows: long enough
# that dispatch does not count, short enough that the last one, filled up with zeros, does not either, and
# that those in flight take little memory. All groups of one width share one compiled program.
_PANEL_VALUES = 2**16
_PANEL_ROWS = 128


@jax.jit
def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """⟨column i of A, column j of B⟩: ``[batch, k, n], [batch, k, n] -> [batch, n, n]``."""
    return lax.dot_general(a, b, (((1,), (1,)), ((0,), (0,))), precision="highest")


@jax.jit
def _pair_products(a: jax.Array, b: jax.Array) -> jax.Array:
    """One unit of A against all of B: ``[batch, k, n], [batch, m, k, n] -> [batch, n, m, n]``."""
    return lax.dot_general(a, b, (((1,), (2,)), ((0,), (0,))), precision="highest")


def pair_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The insides of one outer unit of A against those of all outer units of B.

    Args:
      a: ``[batch, k, n]``.
      b: ``[batch, m, k, n]``.

    Returns:
      float64 ``[batch, m, n, n]``, A's units before B's.
    """
    return np.asarray(_pair_products(a, b), np.float64).transpose(0, 2, 1, 3)


class _Chosen:
    """Rows of one term: those of A, and those of B that take their places, less those that leave them."""

    def __init__(self, term: Term, rows: np.ndarray | None, new: np.ndarray, old: np.ndarray | None) -> None:
        self.term, self.rows, self.new, self.old = term, rows, new, old

    def __len__(self) -> int:
        return self.new.shape[-1]

    def write(self, start: int, stop: int, a: np.ndarray, b: np.ndarray) -> None:
        """Fills panels of A and B, ``[batch, stop − start, n]``, with the rows from `start` to `stop`."""
        n = a.shape[-1]
        if self.rows is None:
            a[:] = self.term.a.reshape(len(a), -1, n)[:, start:stop]
        else:
            np.take(self.term.a, self.rows[start:stop], axis=0, out=a[0], mode="clip")
        for batch, panel in enumerate(b):
            np.take(self.term.b, self.new[batch, start:stop], axis=0, out=panel, mode="clip")
        if self.old is not None:
            b[0] -= np.take(self.term.b, self.old[0, start:stop], axis=0)


class Similarity:
    """Inner products of A's units and B's of one group, with B's other groups permuted.

    Only the rows that changed since the last time are multiplied anew, where they are the lesser part.

    Attributes:
      nbytes: of the matrix.
      updates: how often the matrix was corrected since it was last computed as a whole; each correction adds
        the rounding of one product.
    """

    def __init__(self, terms: Sequence[Term], batch: int, size: int) -> None:
        self.terms = tuple(terms)
        self.shape = (batch, size)
        self.nbytes = 8 * batch * size * size
        self.forget()

    def forget(self) -> None:
        """Gives back the memory of the matrix, which the next update then computes as a whole."""
        self.updates = 0
        self._matrix: np.ndarray | None = None
        self._sources: list[np.ndarray | None] = [None] * len(self.terms)

    def update(self, permutation: Permutation, wanted: Sequence[bool] | None = None) -> np.ndarray:
        """Brings the matrix up to a permutation of the other groups.

        Args:
          permutation: rows of the groups that are known.
          wanted: which terms count; by default all.

        Returns:
          The matrix itself, float64 ``[batch, n, n]``, valid until the next update.
        """
        targets = [
            term.sources(permutation).reshape(self.shape[0], -1) if use else None
            for term, use in zip(self.terms, wanted or [True] * len(self.terms), strict=True)
        ]
        fresh, moved, kept = [], [], 0
        for term, new, old in zip(self.terms, targets, self._sources, strict=True):
            if new is None:
                continue
            kept += 0 if old is None else new.size
            if old is None:
                fresh.append(_Chosen(term, None, new, None))
            elif (changed := np.flatnonzero(new[0] != old[0])).size or (new != old).any():
                moved.append(_Chosen(term, changed, new[:, changed], old[:, changed]))
        dropped = any(
            new is None and old is not None for new, old in zip(targets, self._sources, strict=True)
        )
        if dropped or (moved and (self.shape[0] > 1 or sum(map(len, moved)) > kept // 2)):
            self.forget()
            pairs = zip(self.terms, targets, strict=True)
            fresh, moved = [_Chosen(term, None, new, None) for term, new in pairs if new is not None], []
        if self._matrix is None:
            self._matrix = np.zeros((self.shape[0], self.shape[1], self.shape[1]))
        for chosen in (fresh, moved):
            if chosen:
                self._add(chosen, self._matrix)
        self.updates += bool(moved)
        self._sources = targets
        return self._matrix

    def sorted(self) -> np.ndarray:
        """Inner products of each unit's weights in ascending order, for a group nothing else is known of."""
        products = (np.asarray(_products(*term.sorted()), np.float64) for term in self.terms)
        return sum(products, np.zeros((self.shape[0], self.shape[1], self.shape[1])))

    def _add(self, chosen: Sequence[_Chosen], matrix: np.ndarray) -> None:
        """Adds the products of all rows chosen, in panels; the next is filled while one is computed."""
        pending: collections.deque[jax.Array] = collections.deque()
        for a, b in self._panels(chosen):
            pending.append(_products(a, b))
            if len(pending) > 1:
                matrix += np.asarray(pending.popleft())
        for product in pending:
            matrix += np.asarray(product)

    def _panels(self, chosen: Sequence[_Chosen]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All rows in panels of one shape, the last filled up with zeros."""
        batch, n = self.shape
        length = max(_PANEL_ROWS, _PANEL_VALUES // (n * batch))
        dtype = np.result_type(*(c.term.a.dtype for c in chosen))

        def empty() -> tuple[np.ndarray, np.ndarray]:
            # New ones for each panel: a product that is still being computed may read the last ones.
            return np.empty((batch, length, n), dtype), np.empty((batch, length, n), dtype)

        (a, b), filled = empty(), 0
        for part in chosen:
            start = 0
            while start < len(part):
                stop = min(len(part), start + length - filled)
                end = filled + stop - start
                part.write(start, stop, a[:, filled:end], b[:, filled:end])
                start, filled = stop, end
                if filled == length:
                    yield a, b
                    (a, b), filled = empty(), 0
        if filled:
            a[:, filled:] = b[:, filled:] = 0
            yield a, b
