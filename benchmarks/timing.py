"""Fair turns on a machine that is not ours alone, and how measured numbers are written."""

from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["mean_and_deviation", "rotated"]


def rotated(names: Iterable[str], turn: int) -> list[str]:
    """The order of the contestants in a turn: number `turn` goes first, the others follow as before.

    So a machine that slows down does so for all of them.
    """
    names = list(names)
    turn %= len(names)
    return names[turn:] + names[:turn]


def mean_and_deviation(values: Sequence[float], scale: float, digits: int) -> str:
    """Mean ± standard deviation of values times `scale`, for example ``"1.50±0.71"``.

    One value is written alone, and none as nothing.

    Examples:
      >>> mean_and_deviation([0.01, 0.02], 100, 2)
      '1.50±0.71'
      >>> mean_and_deviation([0.01], 100, 2)
      '1.00'
    """
    if not len(values):
        return ""
    text = f"{scale * np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text}±{scale * np.std(values, ddof=1):.{digits}f}"
