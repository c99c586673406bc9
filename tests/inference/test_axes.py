"""The algebra of axes: what is united, factored or split stays so under every permutation that is left."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rebasin import Axis
from rebasin.inference.axes import (
    Node,
    concatenate,
    factor,
    factors,
    pieces,
    pin,
    product,
    reasons,
    split,
    unite,
    write_axis,
)

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


def named(node):
    """A name for each factor that moves, and the other way round."""
    names = {root: f"P{i}" for i, root in enumerate(dict.fromkeys(factors(node))) if not root.is_pinned}
    return names, {name: root for root, name in names.items()}


@given(operations(), st.integers(0, 10**6))
def test_the_axis_written_describes_the_same_permutation(program, seed):
    node = Node(24)
    parts = [node]
    for name, number in program:
        rng = np.random.default_rng(number)
        target = parts[rng.integers(len(parts))]
        if name == "factor":
            outer = int(rng.choice(divisors(target.size)))
            parts += factor(target, [outer, target.size // outer], WHY)
        elif name == "split":
            cut = int(rng.integers(0, target.size + 1))
            parts += [part for part in split(target, [cut, target.size - cut], WHY) if part.size]
        elif name == "pin" and number % 3 == 0:
            pin(target, WHY)
    names, roots = named(node)
    axis = write_axis(node, names.get)
    permutation_of = draw_permutations(seed)
    written = axis.fold(
        24,
        lambda f: np.arange(f.size) if f.group is None else realise(roots[f.group], permutation_of),
        lambda perms: join("product", perms),
        lambda perms: join("sum", perms),
    )
    np.testing.assert_array_equal(written, realise(node, permutation_of))
    assert all(root.is_atomic for piece in pieces(node) for root in piece)
    assert sum(math.prod(root.size for root in piece) for piece in pieces(node)) == 24


def test_flattened_convolution_then_concatenation():
    channels = Node(8)
    flat = product([Node(4), channels])
    pin(flat.parts[0], "positions")
    joined = concatenate([flat, Node(6)])
    first, second = split(joined, [32, 6], WHY)
    assert first.root is flat.root
    assert str(write_axis(joined, {channels: "c", second.root: "d"}.get)) == "4*c:8 + d:6"
    assert not channels.is_pinned
    assert not second.is_pinned


def test_common_refinement_of_two_products():
    x = Node(24)
    left, right = factor(x, [2, 12], WHY), factor(x, [8, 3], WHY)
    assert [[node.size for node in piece] for piece in pieces(x)] == [[2, 4, 3]]
    assert pieces(left[1])[0][1] is pieces(right[1])[0][0]


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


def test_a_sum_behind_a_factor_that_moves_is_a_factor_of_the_axis():
    """Two heads, each with three dimensions of one group and five of another."""
    heads, a, b = Node(2), Node(3), Node(5)
    whole = product([heads, concatenate([a, b])])
    assert pieces(whole) == [[heads, a], [heads, b]]
    assert list(factors(whole)) == [heads, a, b]
    assert str(write_axis(whole, {heads: "H", a: "A", b: "B"}.get)) == "H:2*(A:3 + B:5)"
    assert not heads.is_pinned


def test_a_sum_before_other_factors_is_distributed_over_them():
    a, b, inner = Node(2), Node(3), Node(4)
    whole = product([concatenate([a, b]), inner])
    assert str(write_axis(whole, {a: "A", inner: "I"}.get)) == "A:2*I:4 + 3*I:4"


def test_what_stays_is_joined_into_one_factor():
    """Rotary embeddings by halves: both halves of each head are pinned, so the whole head dimension is."""
    heads, dims = Node(3), Node(4)
    whole = product([heads, dims])
    first, second = split(dims, [2, 2], WHY)
    pin(first, "turned")
    assert str(write_axis(whole, {heads: "H", second: "D"}.get)) == "H:3*(2 + D:2)"
    pin(second, "turned as well")
    assert (dims.is_pinned, dims.reason) == (True, "turned")
    assert str(write_axis(whole, {heads: "H"}.get)) == "H:3*4"


def test_an_axis_of_single_positions_stays():
    """The gate and the value of an interleaved gated unit are taken out one by one."""
    units, pair = factor(Node(12), [6, 2], WHY)
    split(pair, [1, 1], WHY)
    assert pair.reason == "a position that is taken out by itself"
    assert not pair.is_position_dependent
    assert not units.is_pinned


def test_reasons_of_single_positions():
    whole = concatenate([Node(1), Node(4)])
    assert reasons(whole) == ["a position that is taken out by itself"]
    assert reasons(Node(1)) == []


def test_what_is_pinned_by_its_parts_keeps_them():
    """An axis of stacked layers is found again in a product whose other factor is pinned later."""
    layers, rest = Node(3), Node(4)
    pin(layers, "layers", position_dependent=False)
    whole = product([layers, rest])
    pin(rest, "neighbours")
    assert whole.is_position_dependent
    assert not layers.is_position_dependent
    assert factor(whole, [3, 4], WHY)[0].root is layers


def test_what_is_united_with_pinned_parts_stays():
    parts, other = [Node(2), Node(3)], Node(5)
    whole = concatenate(parts)
    for part in parts:
        pin(part, "first")
    unite(other, whole, WHY)
    assert other.reason == "first"


def test_writing_can_stop_at_chosen_nodes():
    node = Node(24)
    outer, inner = factor(node, [4, 6], WHY)
    split(inner, [2, 4], WHY)
    labels = {outer: "O", inner: "I"}
    assert write_axis(node, labels.get, is_factor=labels.__contains__) == Axis.product(("O", 4), ("I", 6))


def test_sizes_are_plain_integers():
    """`jnp.split` cuts into pieces of NumPy integers, which cannot be written as JSON."""
    assert all(type(part.size) is int for part in split(Node(6), list(np.array([2, 4])), WHY))


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
