"""Outputs that are the next values of leaves, and leaves that the caller pins."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec, infer_spec, verify_spec
from rebasin.errors import InferenceError, TreeMismatchError, VerificationError
from rebasin.trees import state_leaves

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
TREE = {
    "params": {"w": jnp.ones((3, 6)), "v": jnp.ones((6, 2))},
    "stats": {"mean": jnp.zeros(6), "var": jnp.ones(6)},
}
TABLE = {
    "params/w": (None, "P"),
    "params/v": ("P", None),
    "stats/mean": ("P",),
    "stats/var": ("P",),
}
STATE = {"1": "stats"}


def normalise(tree, x):
    """A hidden layer, normalised over the batch, and its running statistics."""
    h = x @ tree["params"]["w"]
    mean, var = h.mean(0), h.var(0)
    out = jnp.tanh((h - mean[None]) / jnp.sqrt(var + 1e-3)[None]) @ tree["params"]["v"]
    stats = tree["stats"]
    return out, {"mean": 0.9 * stats["mean"] + 0.1 * mean, "var": 0.9 * stats["var"] + 0.1 * var}


def test_running_statistics_move_with_their_channels():
    spec = infer_spec(normalise, TREE, X, state_outputs=STATE)
    assert spec.equivalent(PermutationSpec.from_axes(TABLE))
    verify_spec(spec, normalise, TREE, X, state_outputs=STATE)


def test_without_state_outputs_they_pin_their_channels():
    spec = infer_spec(normalise, TREE, X)
    assert spec.groups == ()
    assert {pin.path: pin.reason for pin in spec.pins}["stats/mean"] == "reaches an axis of output 1"
    with pytest.raises(VerificationError, match="P: outputs change by"):
        verify_spec(PermutationSpec.from_axes(TABLE), normalise, TREE, X)


def test_next_values_that_do_not_move_with_their_leaf_are_caught():
    def wrong(tree, x):
        out, stats = normalise(tree, x)
        return out, stats | {"mean": stats["mean"][::-1]}

    spec = infer_spec(wrong, TREE, X, state_outputs=STATE)
    assert spec.groups == ()
    with pytest.raises(VerificationError, match="P: outputs change by"):
        verify_spec(PermutationSpec.from_axes(TABLE), wrong, TREE, X, state_outputs=STATE)


def test_training_step_returns_the_whole_tree():
    def step(tree, x):
        grads = jax.grad(lambda params: (normalise(tree | {"params": params}, x)[0] ** 2).sum())(
            tree["params"]
        )
        params = jax.tree.map(lambda w, g: w - 0.1 * g, tree["params"], grads)
        return {"params": params, "stats": normalise(tree, x)[1]}

    spec = infer_spec(step, TREE, X, state_outputs={"": ""})
    assert spec.equivalent(PermutationSpec.from_axes({**TABLE, "params/v": ("P", "out")}))
    verify_spec(spec, step, TREE, X, state_outputs={"": ""})


def test_one_leaf_at_a_time():
    state = {"1/mean": "stats/mean", "1/var": "stats/var"}
    assert state_leaves(state, jax.eval_shape(normalise, TREE, X), TREE) == state


def test_every_path_that_does_not_fit_is_listed():
    with pytest.raises(TreeMismatchError) as info:
        infer_spec(
            normalise,
            TREE,
            X,
            state_outputs={"2": "stats", "1": "statistics", "0": "stats/mean", "1/mean": "stats/mean"}
            | {"1/var": "stats/mean"},
        )
    assert str(info.value).splitlines() == [
        "state_outputs do not fit the function:",
        "  '2': no such output; the outputs are ['0', '1/mean', '1/var']",
        "  '1/mean': its leaf would be 'statistics/mean', which is not in the tree",
        "  '1/var': its leaf would be 'statistics/var', which is not in the tree",
        "  '0': shape (5, 2), but the leaf 'stats/mean' has shape (6,)",
        "  '1/var': the leaf 'stats/mean' already has a next value",
    ]


@pytest.mark.parametrize("name", ["params/w", "params"])
def test_leaves_pinned_by_the_caller(name):
    spec = infer_spec(lambda tree, x: normalise(tree, x)[0], TREE, X, pin=[name])
    assert spec.groups == ()
    assert {(p.path, p.axis): p.reason for p in spec.pins}["params/w", 1] == "pinned by the caller"


def test_a_leaf_that_is_not_there_cannot_be_pinned():
    message = (
        r"cannot pin \['params/W'\]: no such leaves; the tree has \['params/v', 'params/w', 'stats/mean'"
    )
    with pytest.raises(InferenceError, match=message):
        rebasin.infer_spec(normalise, TREE, X, pin=["params/W", "params/w"])


def test_a_leaf_that_is_only_written_moves_with_its_next_value():
    """The average that BatchNorm corrects for its first steps is written at every step and never read."""

    def step(tree, x):
        h = x @ tree["w"]
        hidden = 0.9 * tree["stats"]["hidden"] + 0.1 * h.mean(0)
        stats = {"hidden": hidden, "average": hidden / 0.19, "count": jnp.zeros((4,))}
        return jnp.tanh(h - h.mean(0)[None]) @ tree["v"], stats

    stats = {"hidden": jnp.zeros((6,)), "average": jnp.zeros((6,)), "count": jnp.zeros((4,))}
    tree = {"w": jnp.ones((3, 6)), "v": jnp.ones((6, 2)), "stats": stats}
    spec = infer_spec(step, tree, X, state_outputs=STATE)
    table = {"w": (None, "P"), "v": ("P", None), "stats/hidden": ("P",), "stats/average": ("P",)}
    assert spec.equivalent(PermutationSpec.from_axes({**table, "stats/count": (None,)}))
    reasons = {pin.path: pin.reason for pin in spec.pins}
    assert reasons["stats/count"] == "the function does not use this leaf"
    longer = jax.random.normal(jax.random.key(7), (9, 3))
    verify_spec(spec, step, tree, longer, state_outputs=STATE)


def test_a_leaf_that_is_only_handed_on_stays():
    def step(tree, x):
        return jnp.tanh(x @ tree["w"]) @ tree["v"], {"spare": tree["stats"]["spare"]}

    tree = {"w": jnp.ones((3, 6)), "v": jnp.ones((6, 2)), "stats": {"spare": jnp.ones((6, 4))}}
    spec = infer_spec(step, tree, X, state_outputs=STATE)
    table = {"w": (None, "P"), "v": ("P", None), "stats/spare": (None, None)}
    assert spec.equivalent(PermutationSpec.from_axes(table))


def test_a_leaf_that_is_only_written_keeps_what_no_other_leaf_carries():
    """The last hidden values and a padding of zeros, side by side."""

    def step(tree, x):
        h = jnp.tanh(x @ tree["w"])
        return h @ tree["v"], {"last": jnp.concatenate([h.mean(0), jnp.zeros((4,))])}

    tree = {"w": jnp.ones((3, 6)), "v": jnp.ones((6, 2)), "stats": {"last": jnp.zeros((10,))}}
    spec = infer_spec(step, tree, X, state_outputs=STATE)
    last = rebasin.Axis.concatenate(rebasin.Axis.product(("P", 6)), rebasin.Axis.product(4))
    table = {"w": (None, "P"), "v": ("P", None), "stats/last": (last,)}
    assert spec.equivalent(PermutationSpec.from_axes(table)), str(spec)
