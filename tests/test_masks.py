"""Masks: how they are applied, checked, joined, shuffled, reported, hashed and stored."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree

from rebasin.errors import ConfigError, TreeMismatchError
from rebasin.masks import (
    apply_mask,
    check_mask,
    full_mask,
    join_masks,
    load_mask,
    mask_digest,
    save_mask,
    shuffle_mask,
    sparsity_report,
)
from rebasin.pruning import random_mask

TREE = random_tree(u=(4, 6), v=(6, 5), bias=(6,))
MASK = random_mask(TREE, 0.5, key=jax.random.key(0))


def test_what_stays_keeps_its_bits_and_what_goes_is_plus_zero():
    odd = jnp.array([-0.0, 1e-42, jnp.inf, jnp.nan, -3.0, -jnp.inf])
    keys = jax.random.key(0)
    tree = {"w": odd, "half": odd.astype(jnp.bfloat16), "n": jnp.arange(6), "key": keys}
    mask = full_mask(tree)
    for path, values in apply_mask(mask, tree).items():
        if path != "key":
            assert values.dtype == tree[path].dtype
            assert np.asarray(values).tobytes() == np.asarray(tree[path]).tobytes()
    none = {path: np.zeros_like(leaf) for path, leaf in mask.items()}
    for path, values in jax.jit(apply_mask)(none, tree).items():
        if path != "key":
            assert np.asarray(values).tobytes() == bytes(np.asarray(values).nbytes)


def test_a_mask_that_does_not_fit():
    wrong = {"u": MASK["u"].T, "v": MASK["v"], "w": MASK["v"]}
    for call in (lambda: apply_mask(wrong, TREE), lambda: check_mask(wrong, TREE)):
        with pytest.raises(TreeMismatchError) as info:
            call()
        assert str(info.value).splitlines() == [
            "params and mask differ:",
            "  bias: only in params",
            "  w: only in mask",
            "  u: shape (4, 6) in params, (6, 4) in mask",
        ]
    with pytest.raises(TreeMismatchError) as info:
        apply_mask(MASK | {"u": MASK["u"].astype(np.float32)}, TREE)
    assert str(info.value).splitlines() == ["the mask is none:", "  u: wanted booleans, got float32"]


def test_masks_go_by_name():
    tree = [TREE["u"], TREE["v"]]
    named = {"1": MASK["v"], "0": MASK["u"]}
    chex.assert_trees_all_equal(apply_mask(named, tree), apply_mask([MASK["u"], MASK["v"]], tree))


def test_joined_masks_cover_the_network_between():
    other = random_mask(TREE, 0.7, key=jax.random.key(1))
    between = jax.tree.map(lambda a, b: (a + b) / 2, apply_mask(MASK, TREE), apply_mask(other, TREE))
    joined = join_masks(MASK, other)
    for path in ("u", "v"):
        np.testing.assert_array_equal(joined[path], np.asarray(between[path]) != 0)
    with pytest.raises(TreeMismatchError, match="v: only in mask"):
        join_masks(MASK, {"u": MASK["u"], "bias": MASK["bias"]})


def test_shuffled_masks_keep_the_count_of_every_leaf():
    moved, again, other = (shuffle_mask(MASK, key=jax.random.key(i)) for i in (3, 3, 4))
    assert sparsity_report(moved) == sparsity_report(MASK)
    chex.assert_trees_all_equal(moved, again)
    assert not np.array_equal(moved["u"], MASK["u"])
    assert not np.array_equal(moved["u"], other["u"])


def test_the_report():
    report = sparsity_report({"u": np.array([[True, False, False]]), "v": np.ones((0, 2), bool)})
    assert report.total == (1, 3)
    assert report.leaves["v"].density == 1
    assert str(report).splitlines()[0].split() == ["u", "1", "of", "3", "33.33%"]
    with pytest.raises(ConfigError, match="no leaf 'x'"):
        sparsity_report(MASK, ["x"])


def test_the_digest_is_of_names_shapes_and_entries():
    moved = MASK | {"u": MASK["u"].reshape(6, 4)}
    renamed = {"w": MASK["u"], "v": MASK["v"], "bias": MASK["bias"]}
    flipped = MASK | {"u": MASK["u"] ^ (np.arange(24).reshape(4, 6) == 23)}
    assert len({mask_digest(mask) for mask in (MASK, moved, renamed, flipped)}) == 4
    assert mask_digest(MASK) == mask_digest(jax.tree.map(jnp.asarray, MASK))
    assert mask_digest([MASK["u"], MASK["v"]]) == mask_digest({"0": MASK["u"], "1": MASK["v"]})


def test_save_and_load(tmp_path):
    nested = {"params": {"Dense_0": {"kernel": MASK["u"], "bias": MASK["bias"]}}, "step": np.array(True)}
    save_mask(tmp_path / "mask.npz", nested)
    loaded = load_mask(tmp_path / "mask.npz", nested)
    chex.assert_trees_all_equal(loaded, nested)
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(loaded))
    assert [path.name for path in tmp_path.iterdir()] == ["mask.npz"]


def test_a_file_that_holds_no_mask_of_the_network(tmp_path):
    path = tmp_path / "mask.npz"
    save_mask(path, {"u": MASK["u"], "w": MASK["v"]})
    with pytest.raises(TreeMismatchError) as info:
        load_mask(path, {"u": np.ones((9, 9)), "v": TREE["v"]})
    assert str(info.value).splitlines() == [
        f"{path} holds no mask of this network:",
        "  v: only in the network",
        "  w: only in the file",
        "  u: uint8 array of shape (3,), wanted the bits of (9, 9)",
    ]
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:-30] + b"x" * 30):
        path.write_bytes(content)
        with pytest.raises(TreeMismatchError) as info:
            load_mask(path, {"u": TREE["u"], "w": TREE["v"]})
        assert str(info.value) == f"{path}: not a saved mask, or damaged"
