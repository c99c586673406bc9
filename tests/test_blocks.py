import jax
import jax.numpy as jnp
import numpy as np

from rebasin import Axis, PermutationSpec, permute


def test_indexed_groups_in_segments_move_alike_with_and_without_jit():
    """Blocks are cut from a leaf and written back; compiled in place, reads once overtook writes."""
    head = Axis.product(("H", 2), ("D", 4))
    spec = PermutationSpec.from_axes({"w": (Axis.concatenate(head, head),)}, indexed={"D": ["H"]})
    permutation = {"H": np.arange(2), "D": np.array([[1, 2, 3, 0], [0, 1, 3, 2]])}
    expected = [1, 2, 3, 0, 4, 5, 7, 6, 9, 10, 11, 8, 12, 13, 15, 14]
    tree = {"w": jnp.arange(16.0)}
    assert permute(spec, permutation, tree)["w"].tolist() == expected
    assert jax.jit(permute, static_argnums=0)(spec, permutation, tree)["w"].tolist() == expected
