"""The algebra of axes: what is united, factored or split stays so under every permutation that is left."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebasin.inference.axes import Node, concatenate, factor, pin, product, segments, split, unite

WHY = "test"


def realise(node, rng_of):
    """The permutation of a node, given random permutations of its whole parts."""
    root = node.root
    if root.is_pinned:
        return np.arange(root.size)
    if root.form == "whole":
        return rng_of(root)
    return join(root.form, [realise(part, rng_of) for part in root.parts])


def join(form, perms):
    """The permutation of a product or a sum from those of its parts, in the gather convention."""
    if form == "product":
        index = np.zeros(1, int)
        for perm in perms:
            index = (index[:, None] * len(perm) + perm[None, :]).reshape(-1)
        return index
    offsets = np.cumsum([0, *map(len, perms)])
    return np.concatenate([offset + perm for offset, perm in zip(offsets, perms, strict=False)])


def draw_permutations(seed):
    rng, drawn = np.random.default_rng(seed), {}

    def of(root):
        return drawn.setdefault(root, rng.permutation(root.size))

    return of


def divisors(n):
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def operations(draw):
    """A program of up to 12 operations over axes of 24 and 12 positions, whose results become operands."""
    return [
        (
            draw(st.sampled_from(["factor", "split", "unite", "pin", "product", "concatenate"])),
            draw(st.integers(0, 10**6)),
        )
        for _ in range(draw(st.integers(1, 12)))
    ]


@given(operations(), st.integers(0, 10**6))
def test_every_relation_outlives_later_refinements(program, seed):
    nodes = [Node(24), Node(24), Node(24), Node(12), Node(12)]
    relations = []
    for name, number in program:
        rng = np.random.default_rng(number)
        node = nodes[rng.integers(len(nodes))]
        if name == "factor":
            outer = int(rng.choice(divisors(node.size)))
            middle = int(rng.choice(divisors(node.size // outer)))
            parts = factor(node, [outer, middle, node.size // outer // middle], WHY)
            relations.append((node, "product", parts))
            nodes += parts
        elif name == "split":
            cuts = sorted(rng.integers(0, node.size + 1, size=2).tolist())
            parts = split(node, [cuts[0], cuts[1] - cuts[0], node.size - cuts[1]], WHY)
            relations.append((node, "sum", parts))
            nodes += [part for part in parts if part.size]
        elif name == "unite":
            other = next(n for n in nodes if n.size == node.size)
            unite(node, other, WHY)
            relations.append((node, "sum", [other]))
        elif name == "pin" and number % 3 == 0:
            pin(node, WHY)
        elif name in ("product", "concatenate"):
            other = nodes[rng.integers(len(nodes))]
            if node.size * other.size <= 600:
                make, form = (product, "product") if name == "product" else (concatenate, "sum")
                whole = make([node, other])
                relations.append((whole, form, [node, other]))
                nodes.append(whole)
    permutation_of = draw_permutations(seed)
    for whole, form, parts in relations:
        expected = join(form, [realise(part, permutation_of) for part in parts])
        np.testing.assert_array_equal(realise(whole, permutation_of), expected)


@given(operations(), st.integers(0, 10**6))
def test_segments_describe_the_same_permutation(program, seed):
    node = Node(24)
    pieces = [node]
    for name, number in program:
        rng = np.random.default_rng(number)
        target = pieces[rng.integers(len(pieces))]
        if name == "factor":
            outer = int(rng.choice(divisors(target.size)))
            pieces += factor(target, [outer, target.size // outer], WHY)
        elif name == "split":
            cut = int(rng.integers(0, target.size + 1))
            pieces += [part for part in split(target, [cut, target.size - cut], WHY) if part.size]
    flat = segments(node)  # may pin; so everything is drawn afterwards
    permutation_of = draw_permutations(seed)
    parts = [join("product", [realise(factor, permutation_of) for factor in segment]) for segment in flat]
    np.testing.assert_array_equal(join("sum", parts), realise(node, permutation_of))
    assert all(factor.is_pinned or factor.form == "whole" for segment in flat for factor in segment)


def test_flattened_convolution_then_concatenation():
    channels = Node(8)
    flat = product([Node(4), channels])
    pin(flat.parts[0], "positions")
    joined = concatenate([flat, Node(6)])
    first, second = split(joined, [32, 6], WHY)
    assert first.root is flat.root
    assert [[factor.size for factor in segment] for segment in segments(joined)] == [[4, 8], [6]]
    assert not channels.is_pinned
    assert not second.is_pinned


def test_common_refinement_of_two_products():
    x = Node(24)
    left, right = factor(x, [2, 12], WHY), factor(x, [8, 3], WHY)
    assert [[node.size for node in segment] for segment in segments(x)] == [[2, 4, 3]]
    assert segments(left[1])[0][1].root is segments(right[1])[0][0].root


def test_incompatible_factors_pin():
    x = Node(24)
    factor(x, [4, 6], WHY)
    factor(x, [6, 4], "cannot be read both ways")
    assert x.is_pinned
    assert x.reason == "cannot be read both ways"


def test_sum_read_as_product_ties_the_inner_factors():
    q, k = Node(12), Node(12)
    outer, inner = factor(concatenate([q, k]), [6, 4], WHY)
    assert [part.size for part in outer.parts] == [3, 3]
    assert not inner.is_pinned
    assert q.parts[1].root is inner.root
    assert k.parts[1].root is inner.root


def test_segments_of_a_product_over_a_sum_unroll_pinned_positions():
    """Two positions of channels a + b, flattened: a, b, a, b."""
    a, b = Node(3), Node(5)
    positions = Node(2)
    pin(positions, "positions")
    flat = segments(product([positions, concatenate([a, b])]))
    assert [segment[-1].root for segment in flat] == [a, b, a, b]


def test_segments_pin_a_moving_factor_around_a_sum():
    heads = Node(2)
    segments(product([heads, concatenate([Node(3), Node(5)])]))
    assert heads.reason == "it repeats a concatenated axis, which no spec can express"


def test_segments_can_leave_a_product_around_a_sum_as_one_factor():
    heads, dims, rest = Node(2), concatenate([Node(3), Node(5)]), Node(4)
    asked = []

    def refuse(outer, repeated, count):
        asked.append((outer, repeated, count))
        return False

    whole = product([heads, dims])
    assert segments(concatenate([whole, rest]), may_repeat=refuse) == [[whole], [rest]]
    assert asked == [([heads], dims, 4)]
    assert not heads.is_pinned


def test_segments_can_stop_at_chosen_nodes():
    node = Node(24)
    outer, inner = factor(node, [4, 6], WHY)
    split(inner, [2, 4], WHY)
    assert segments(node, is_factor=lambda x: x is inner.root or not x.parts) == [[outer, inner]]


def test_too_many_segments_pin_the_sum():
    positions, pieces = Node(600), concatenate([Node(3), Node(5)])
    pin(positions, "positions")
    assert segments(product([positions, pieces])) == [[positions, pieces]]
    assert pieces.reason == "it would fall into 1200 segments"


def test_pinning_spreads_to_all_that_is_united_and_keeps_the_first_reason():
    x, y, z = Node(6), Node(6), Node(6)
    unite(x, y, WHY)
    parts = factor(y, [2, 3], WHY)
    pin(x, "first")
    unite(z, y, WHY)
    pin(z, "second")
    assert {node.reason for node in (x, y, z, *parts)} == {"first"}


@pytest.mark.parametrize("sizes", list(itertools.permutations([1, 2, 3, 1, 4])))
def test_factors_of_size_one_are_kept_in_place(sizes):
    parts = factor(Node(math.prod(sizes)), sizes, WHY)
    assert tuple(part.size for part in parts) == sizes
