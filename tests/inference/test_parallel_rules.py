"""Programs on the shards of a device mesh have the symmetries of the same program without a mesh.

Two shards need two devices to run, but not to be traced: specs are inferred from the sharded function on an
abstract mesh, and verified on the plain function that computes the same.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import check, random_tree
from jax import lax
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

import rebasin
from rebasin import Axis, PermutationSpec, infer_spec, verify_spec

TWO = AbstractMesh((2,), ("d",), axis_types=(AxisType.Auto,))
X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)), jnp.float32)
LONGER = jnp.asarray(np.random.default_rng(1).normal(size=(10, 4)), jnp.float32)


def one_device():
    return jax.make_mesh((1,), ("d",), axis_types=(AxisType.Auto,))


def plain(t, x):
    return jnp.tanh(x @ t["w"]) @ t["v"]


TREE = random_tree(w=(4, 8), v=(8, 2))


def check_sharded(sharded, plain, tree, **expected):
    """Compare with the spec expected, and verify it on the plain function, also at another length."""
    spec = infer_spec(sharded, tree, X)
    wanted = PermutationSpec.from_axes(expected)
    assert spec.equivalent(wanted), f"inferred:\n{spec}\nwanted:\n{wanted}"
    for x in (X, LONGER):
        verify_spec(spec, plain, tree, x)


def test_data_parallel_examples_leave_the_units_free():
    def function(t, x):
        inner = jax.shard_map(plain, mesh=TWO, in_specs=(P(), P("d")), out_specs=P("d"))
        return inner(t, x)

    check_sharded(function, plain, TREE, w=(None, "P"), v=("P", None))


def test_tensor_parallel_units_move_within_their_shard():
    def shard(t, x):
        return lax.psum(plain(t, x), "d")

    def function(t, x):
        specs = {"w": P(None, "d"), "v": P("d", None)}
        return jax.shard_map(shard, mesh=TWO, in_specs=(specs, P()), out_specs=P())(t, x)

    units = Axis.product(2, ("P", 4))
    check_sharded(function, plain, TREE, w=(None, units), v=(units, None))
    why = [pin.reason for pin in infer_spec(function, TREE, X).pins if (pin.path, pin.axis) == ("w", 1)]
    assert len(why) == 1
    assert "shard" in why[0]


@pytest.mark.parametrize("tiled", [True, False])
def test_gathered_shards(tiled):
    def shard(t, x):
        h = lax.all_gather(jnp.tanh(x @ t["w"]), "d", axis=1, tiled=tiled)
        return h.reshape(x.shape[0], 8) @ t["v"]

    def function(t, x):
        specs = {"w": P(None, "d"), "v": P()}
        return jax.shard_map(shard, mesh=TWO, in_specs=(specs, P()), out_specs=P(), check_vma=False)(t, x)

    units = Axis.product(2, ("P", 4))
    check_sharded(function, plain, TREE, w=(None, units), v=(units, None))


def test_scattered_sums_and_exchanged_shards():
    """Units are summed over the devices and dealt out; then units are exchanged for rows of other devices."""

    def shard(t, x):
        h = lax.psum_scatter(jnp.tanh(x @ t["w"]), "d", scatter_dimension=1, tiled=True)  # 4 of 8 units
        h = lax.all_to_all(h, "d", split_axis=1, concat_axis=0, tiled=True)  # 2 units of twice as many rows
        return lax.psum(jnp.sin(h) @ t["v"], "d") + lax.pmax(h, "d") @ t["u"]

    def without_mesh(t, x):
        h = jnp.tanh(x @ t["w"])
        h = h[: len(x) // 2] + h[len(x) // 2 :]
        first, second = (jnp.concatenate([h[:, i : i + 2], h[:, i + 4 : i + 6]]) for i in (0, 2))
        return (jnp.sin(first) + jnp.sin(second)) @ t["v"] + jnp.maximum(first, second) @ t["u"]

    def function(t, x):
        inner = jax.shard_map(shard, mesh=TWO, in_specs=(P(), P("d")), out_specs=P())
        return inner(t, x)

    tree = random_tree(w=(4, 8), v=(2, 2), u=(2, 2))
    units = Axis.product(4, ("P", 2))
    check_sharded(function, without_mesh, tree, w=(None, units), v=("P", None), u=("P", None))


def test_shards_that_meet_are_permuted_alike():
    """Units of one shard are added to those of the next."""

    def shard(t, x):
        h = jnp.tanh(x @ t["w"])
        h = h + lax.ppermute(jnp.sin(h), "d", [(0, 1), (1, 0)])
        return lax.psum(h @ t["v"], "d")

    def rolled(t, x):
        h = jnp.tanh(x @ t["w"])
        return (h + jnp.roll(jnp.sin(h), 4, axis=1)) @ t["v"]

    def function(t, x):
        specs = {"w": P(None, "d"), "v": P("d", None)}
        return jax.shard_map(shard, mesh=TWO, in_specs=(specs, P()), out_specs=P())(t, x)

    units = Axis.product(2, ("P", 4))
    check_sharded(function, rolled, TREE, w=(None, units), v=(units, None))


def test_one_device_is_as_none():
    def shard(t, x):
        return lax.psum(plain(t, x) * (1 + lax.axis_index("d")), "d")

    def function(t, x):
        specs = {"w": P(None, "d"), "v": P("d", None)}
        return jax.shard_map(shard, mesh=one_device(), in_specs=(specs, P()), out_specs=P())(t, x)

    spec = check(function, TREE, X, w=(None, "P"), v=("P", None))
    verify_spec(spec, function, TREE, LONGER)


def test_activations_are_matched_around_a_shard_map():
    """The program on a shard cannot be evaluated by itself, since it names an axis of the mesh."""

    def shard(h, v):
        return lax.psum(jnp.tanh(h) @ v, "d")

    def function(t, x):
        inner = jax.shard_map(shard, mesh=one_device(), in_specs=(P(None, "d"), P("d")), out_specs=P())
        return inner(jnp.tanh(x @ t["w"]), t["v"])

    spec = infer_spec(function, TREE, X)
    permutation = {"w": np.random.default_rng(2).permutation(8)}
    planted = rebasin.permute(spec, permutation, TREE)
    batch = rebasin.Batch(X, X)
    match = rebasin.match(spec, TREE, planted, "activations", apply_fn=function, data=batch, batch_size=6)
    restored = rebasin.permute(spec, match.permutation, planted)
    np.testing.assert_array_equal(restored["w"], TREE["w"])


def test_collectives_under_vmap():
    def one(t, x):
        h = jnp.tanh(x @ t["w"])
        centred = h - lax.pmean(h, "batch")
        return (centred * lax.all_gather(h, "batch").max(0)) @ t["v"]

    def function(t, x):
        return jax.vmap(one, in_axes=(None, 0), axis_name="batch")(t, x)

    spec = check(function, TREE, X, w=(None, "P"), v=("P", None))
    verify_spec(spec, function, TREE, LONGER)
