"""Weight matching of a pair both ways, and of B's units in another order."""

from typing import NamedTuple

import jax

import rebasin
from benchmarks.problems import Pair

__all__ = ["Differences", "compare_orders"]


class Differences(NamedTuple):
    """Relative differences of objectives on one pair.

    Attributes:
      swapped: of A to B, from B to A; with one restart.
      swapped_once: the same without.
      reordered: of B in random order, from B as it is; without restarts.
      identity: whether an ascent was made from the identity.
    """

    swapped: float
    swapped_once: float
    reordered: float
    identity: bool


def compare_orders(spec: rebasin.PermutationSpec, pair: Pair, seed: int) -> Differences:
    """Matches a pair both ways, and with B's units in random order."""
    a, b = jax.device_get(pair.load())
    key = jax.random.key(seed)
    moved = rebasin.permute(spec, rebasin.random_permutation(spec, b, key=key), b)
    found = {
        (name, restarts): rebasin.weight_matching(spec, *networks, key=key, restarts=restarts)
        for name, networks in {"as it is": (a, b), "swapped": (b, a), "reordered": (a, moved)}.items()
        for restarts in (0, 1)
    }

    def difference(name: str, restarts: int) -> float:
        new, old = (found[which, restarts].objective[-1] for which in (name, "as it is"))
        return float((new - old) / abs(old))

    return Differences(
        difference("swapped", 1),
        difference("swapped", 0),
        difference("reordered", 0),
        any(match.stats["start"] == "identity" for match in found.values()),
    )
