import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebasin import Axis, PermutationSpec, permute
from rebasin.axis import SizedFactor, cut, iter_blocks, join

HEAD = Axis.product(("H", 2), ("D", 4))
AXES = (Axis.whole("P0"), Axis.concatenate(HEAD, Axis.product(3), Axis.product(("P1", 5), 2)))


@pytest.mark.parametrize(
    ("axis", "text", "groups"),
    [
        (Axis.whole(None), "-", ()),
        (Axis.whole("P0"), "P0", ("P0",)),
        (HEAD, "H:2*D:4", ("H", "D")),
        (AXES[1], "H:2*D:4 + 3 + P1:5*2", ("H", "D", "P1")),
        (Axis.concatenate(HEAD, HEAD), "H:2*D:4 + H:2*D:4", ("H", "D", "H", "D")),
    ],
)
def test_printed_form_and_groups(axis, text, groups):
    assert str(axis) == text
    assert axis.groups == groups
    assert axis.is_whole == (text in ("-", "P0"))
    renamed = axis.rename({group: f"new {group}" for group in groups})
    assert renamed.groups == tuple(f"new {group}" for group in groups)


def test_sizes_are_those_of_the_factors_or_of_the_axis():
    assert Axis.whole("P0").sized(7) == [[SizedFactor(7, "P0")]]
    assert HEAD.sized(8) == [[SizedFactor(2, "H"), SizedFactor(4, "D")]]


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
