"""Numbers as text."""

import doctest

from benchmarks import tables


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(tables)
    assert result.failed == 0
    assert result.attempted >= 4
