import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebasin import Axis, PermutationSpec, permute
from rebasin.axis import SizedFactor, cut, iter_blocks, join

HEAD = Axis.product(("H", 2), ("D", 4))
FUSED = Axis.product(
    ("H", 3), Axis.concatenate(Axis.product(("Q", 2)), Axis.product(1), Axis.product(("V", 2)))
)
AXES = (Axis.whole("P0"), Axis.concatenate(HEAD, Axis.product(3), Axis.product(("P1", 5), 2)))


@pytest.mark.parametrize(
    ("axis", "text", "groups"),
    [
        (Axis.whole(None), "-", ()),
        (Axis.whole("P0"), "P0", ("P0",)),
        (HEAD, "H:2*D:4", ("H", "D")),
        (AXES[1], "H:2*D:4 + 3 + P1:5*2", ("H", "D", "P1")),
        (Axis.concatenate(HEAD, HEAD), "H:2*D:4 + H:2*D:4", ("H", "D", "H", "D")),
        (FUSED, "H:3*(Q:2 + 1 + V:2)", ("H", "Q", "V")),
        (Axis.product(2, Axis.concatenate(FUSED, HEAD)), "2*(H:3*(Q:2 + 1 + V:2) + H:2*D:4)", tuple("HQVHD")),
    ],
)
def test_printed_form_and_groups(axis, text, groups):
    assert str(axis) == text
    assert axis.groups == groups
    assert axis.is_whole == (text in ("-", "P0"))
    renamed = axis.rename({group: f"new {group}" for group in groups})
    assert renamed.groups == tuple(f"new {group}" for group in groups)


def test_sizes_are_those_of_the_factors_or_of_the_axis():
    assert Axis.whole("P0").sized(7) == [SizedFactor(7, "P0")]
    assert HEAD.sized(8) == [SizedFactor(2, "H"), SizedFactor(4, "D")]
    assert [tuple(factor) for factor in FUSED.sized(15)] == [(3, "H"), (2, "Q"), (1, None), (2, "V")]
    assert (Axis.whole("P0").size, HEAD.size, FUSED.size) == (None, 8, 15)


def test_blocks_cover_a_leaf_once_and_join_to_it():
    leaf = jnp.arange(3 * 21).reshape(3, 21)
    blocks = list(iter_blocks(AXES, leaf.shape))
    assert [block.shape for block in blocks] == [(3, 2, 4), (3, 3), (3, 5, 2)]
    assert [block.labels for block in blocks] == [("P0", "H", "D"), ("P0", None), ("P0", "P1", None)]
    pieces = [(block, cut(leaf, block)) for block in blocks]
    np.testing.assert_array_equal(pieces[2][1][1], 21 + np.arange(11, 21).reshape(5, 2))
    joined = join(jnp.zeros_like(leaf), pieces)
    np.testing.assert_array_equal(joined, leaf)
    assert joined.dtype == leaf.dtype


def test_indexed_groups_in_segments_move_alike_with_and_without_jit():
    """Blocks are cut from a leaf and written back; compiled in place, reads once overtook writes."""
    spec = PermutationSpec.from_axes({"w": (Axis.concatenate(HEAD, HEAD),)}, indexed={"D": ["H"]})
    permutation = {"H": np.arange(2), "D": np.array([[1, 2, 3, 0], [0, 1, 3, 2]])}
    expected = [1, 2, 3, 0, 4, 5, 7, 6, 9, 10, 11, 8, 12, 13, 15, 14]
    tree = {"w": jnp.arange(16.0)}
    assert permute(spec, permutation, tree)["w"].tolist() == expected
    assert jax.jit(permute, static_argnums=0)(spec, permutation, tree)["w"].tolist() == expected


def test_an_axis_has_one_form():
    """A concatenation is distributed over the factors behind it, so it stands last in its product."""
    a, b = Axis.product(("A", 2)), Axis.product(("B", 3))
    both = Axis.concatenate(a, b)
    assert str(Axis.product(both, ("C", 4))) == "A:2*C:4 + B:3*C:4"
    assert str(Axis.product(("H", 2), both, ("C", 4))) == "H:2*(A:2*C:4 + B:3*C:4)"
    assert Axis.product(Axis.product(("H", 2), both), ("C", 4)) == Axis.product(("H", 2), both, ("C", 4))
    assert Axis.product(("H", 2), a) == Axis.product(("H", 2), ("A", 2))
    assert str(Axis.product(both, both)) == "A:2*(A:2 + B:3) + B:3*(A:2 + B:3)"


def test_simplifying_joins_what_stays():
    stays = Axis.concatenate(Axis.product(1), Axis.product(3))
    assert str(Axis.product(("H", 2), stays).simplify()) == "H:2*4"
    assert str(Axis.product(3, stays).simplify()) == "-"
    assert str(Axis.product(("H", 2), 3, 5).simplify()) == "H:2*15"
    assert (
        str(Axis.concatenate(stays, Axis.product(("H", 2), 1), Axis.product(2, 2)).simplify())
        == "4 + H:2 + 4"
    )
    assert FUSED.simplify() == FUSED


def test_a_concatenation_that_is_repeated_once_is_no_product():
    """As in attention with a single head; a spec refuses the form that has a simpler one."""
    parts = Axis.concatenate(Axis.product(6), Axis.product(("g", 3)))
    once = Axis.product(1, parts)
    assert once.simplify() == Axis.product(once, 1).simplify() == parts
    assert str(Axis.concatenate(Axis.product(2), once).simplify()) == "8 + g:3"
    assert str(Axis.product(("H", 2), once).simplify()) == "H:2*(6 + g:3)"
    PermutationSpec.from_axes({"w": (once.simplify(),)})


def test_pieces_choose_one_segment_of_every_concatenation():
    deep = Axis.product(("G", 2), Axis.concatenate(FUSED, Axis.product(("K", 5))))
    assert [[f.group for f in piece] for piece in deep.pieces] == [
        ["G", "H", "Q"],
        ["G", "H", None],
        ["G", "H", "V"],
        ["G", "K"],
    ]


DEEP = Axis.concatenate(
    Axis.product(2), Axis.product(("G", 2), Axis.concatenate(FUSED, Axis.product(("K", 4))))
)


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
def test_blocks_of_a_concatenation_inside_a_product(to_array):
    """Two such axes in one leaf: the blocks are those that index arithmetic finds, and join to the leaf."""
    leaf = to_array(np.arange(15 * 40, dtype=np.int32).reshape(15, 40))
    blocks = list(iter_blocks((FUSED, DEEP), leaf.shape))
    assert len(blocks) == 3 * 5
    place = next(b for b in blocks if b.labels == ("H", "V", "G", "H", "Q"))
    values = place.read(leaf)
    assert values.shape == place.shape == (3, 2, 2, 3, 2)
    for h, v, g, i, q in np.ndindex(values.shape):
        assert values[h, v, g, i, q] == leaf[5 * h + 3 + v, 2 + 19 * g + 5 * i + q]
    pieces = [(block, cut(leaf, block)) for block in blocks]
    np.testing.assert_array_equal(join(jnp.zeros_like(leaf), pieces), leaf)


def test_numpy_blocks_are_views():
    leaf = np.zeros((4, 15), np.float32)
    for block in iter_blocks((Axis.whole("P0"), FUSED), leaf.shape):
        block.read(leaf)[:] = 1
    assert leaf.all()
