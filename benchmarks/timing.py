"""Contestants that take turns, so that a machine that slows down does so for all of them."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Timed", "alternate", "median_ratio", "rotated", "run_in_turn"]


class Timed(NamedTuple):
    """A result and the seconds that it took."""

    seconds: float
    result: Any


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """Return the order of the contestants in a turn: number `turn` is first, the others follow as before."""
    names = list(names)
    turn %= len(names)
    return names[turn:] + names[:turn]


def run_in_turn(contestants: Mapping[str, Callable[[], Any]], turn: int) -> dict[str, Timed]:
    """Run every contestant once, one right after the other, and time each.

    Args:
      contestants: what to run, by name.
      turn: number of the round, which decides who goes first.

    Returns:
      The results by name, in the order of `contestants`.
    """
    results = {}
    for name in rotated(contestants, turn):
        began = time.perf_counter()
        result = contestants[name]()
        results[name] = Timed(time.perf_counter() - began, result)
    return {name: results[name] for name in contestants}


def alternate(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time every contestant in every round, after one call of each that does not count.

    Args:
      contestants: what to run, by name.
      rounds: how often each is timed.

    Returns:
      By name, the seconds of each round.
    """
    run_in_turn(contestants, 0)
    results = [run_in_turn(contestants, turn) for turn in range(rounds)]
    return {name: [timed[name].seconds for timed in results] for name in contestants}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Return the median over rounds of the ratio within a round.

    Unlike the ratio of medians it does not suffer when the machine changes its speed between rounds.
    """
    return float(np.median(np.divide(numerator, denominator)))
