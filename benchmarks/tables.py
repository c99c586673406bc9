"""Numbers as text."""

from collections.abc import Sequence

import numpy as np

__all__ = ["markdown_table", "mean_and_deviation", "mean_and_largest"]


def mean_and_deviation(values: Sequence[float], scale: float, digits: int) -> str:
    """Write the mean ± standard deviation of values times `scale`, for example ``"1.50±0.71"``.

    One value is written alone, and no value as an empty text.

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


def mean_and_largest(values: Sequence[float], scale: float) -> str:
    """Write the mean and the maximum of absolute values times `scale`, with one significant digit each.

    Examples:
      >>> mean_and_largest([-0.01, 0.03], 100)
      '2, 3'
    """
    sizes = scale * np.abs(values)
    return f"{np.mean(sizes):.1g}, {np.max(sizes):.1g}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, the first column to the left and the others to the right.

    Examples:
      >>> print(markdown_table(("room", "files"), [("rebasin/", "60"), ("tests/", "7")]))
      | room     | files |
      | :------- | ----: |
      | rebasin/ |    60 |
      | tests/   |     7 |
    """
    widths = [max(3, *(len(row[i]) for row in (header, *rows))) for i in range(len(header))]
    rule = [f":{'-' * (widths[0] - 1)}", *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        texts = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        return f"| {' | '.join(texts)} |"

    return "\n".join([line(header), line(rule), *(line(row) for row in rows)])
