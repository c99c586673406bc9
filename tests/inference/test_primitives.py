"""Every primitive of JAX is in a list, and docs/primitives.md says what the lists say."""

import primitive_table
from primitive_table import PAGE, kind, primitives_of_jax, section

from rebasin.inference.rule import find_rule
from rebasin.inference.rules.opaque import INTERNAL, PINNED_ON_PURPOSE


def test_every_primitive_of_jax_is_in_a_list():
    """A release of JAX that adds one needs a rule for it, or an entry in `rules/opaque.py`."""
    names = primitives_of_jax()
    assert len(names) > 200
    assert [name for name in names if kind(name) is None] == []


def test_no_primitive_is_in_two_lists():
    assert set(PINNED_ON_PURPOSE).isdisjoint(INTERNAL)
    assert [name for name in INTERNAL if find_rule(name) is not None] == []
    rules = {find_rule(name) for name in PINNED_ON_PURPOSE}
    assert [rule.__name__ for rule in rules] == ["pin_on_purpose"]


def test_the_page_lists_what_the_tables_say():
    """`make primitive-table` writes it anew."""
    assert section(PAGE.read_text()) == primitive_table.table()
