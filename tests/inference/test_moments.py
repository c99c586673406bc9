"""The state of an optimiser, and averages of weights, move with the weights that they belong to."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import rebasin
from rebasin import infer_spec

X = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.tanh(nn.Dense(5)(nn.tanh(nn.Dense(5)(x)))))


def trained(optimiser, seed=0, num_steps=2):
    """A state of training after some steps, so that moments are not zero."""
    model = Net()
    params = model.init(jax.random.key(seed), X)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optimiser)
    for _ in range(num_steps):
        state = step(state)
    return state


def step(state):
    return state.apply_gradients(
        grads=jax.grad(lambda p: jnp.mean(state.apply_fn({"params": p}, X) ** 2))(state.params)
    )


def apply(state, x):
    return Net().apply({"params": state.params}, x)


@pytest.mark.parametrize("optimiser", [optax.adam(1e-2), optax.sgd(1e-2, momentum=0.9)], ids=["adam", "sgd"])
def test_training_goes_on_as_it_would_have(optimiser):
    """A step of the permuted state is the permuted state after the step: moments have moved as well."""
    state = trained(optimiser)
    spec = infer_spec(apply, state, X)
    permutation = rebasin.random_permutation(spec, state, key=jax.random.key(1))
    moved = rebasin.permute(spec, permutation, state)
    chex.assert_trees_all_close(
        step(moved).params, rebasin.permute(spec, permutation, step(state)).params, rtol=1e-4, atol=1e-6
    )
    table = dict(spec.leaves)
    assert all(
        table[path] == table[f"params/{path.partition('/mu/')[2]}"] for path in table if "/mu/" in path
    )


def test_state_of_another_form_stays_and_explain_says_so():
    """Adafactor keeps sums over rows and columns, which have other axes than their weights."""
    state = trained(optax.adafactor(1e-2, min_dim_size_to_factor=2))
    spec = infer_spec(apply, state, X)
    rows = [path for path in dict(spec.leaves) if "v_row" in path and path.endswith("kernel")]
    assert rows
    text = spec.explain(state)
    for path in rows:
        assert not any(axis.groups for axis in spec.table[path])
        assert f"  {path} axis 0" in text.partition("stays put: the function does not use this leaf")[2]
        assert f"  {path}" in text.partition("neither matched nor averaged, role optimiser state:")[2]


def test_moments_of_nnx():
    class NnxNet(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = nnx.Linear(3, 5, rngs=rngs), nnx.Linear(5, 2, rngs=rngs)

    model = NnxNet(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=nnx.Param)
    tree = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}

    def apply(tree, x):
        w = tree["model"]
        return jnp.tanh(x @ w["up"]["kernel"][...]) @ w["down"]["kernel"][...]

    table = infer_spec(apply, tree, X).table
    assert table["optimizer/opt_state/0/mu/up/kernel/value"] == table["model/up/kernel/value"]
    assert table["optimizer/opt_state/0/nu/down/kernel/value"] == table["model/down/kernel/value"]
    assert table["model/up/kernel/value"][1].groups


def test_averages_of_weights_move_with_them():
    leaves = {"w": jnp.ones((3, 5)), "v": jnp.ones((5, 2))}

    def apply(tree, x):
        return jnp.tanh(x @ tree["params"]["w"]) @ tree["params"]["v"]

    for name, moves in (("ema_params", True), ("ema", True), ("params_ema", True), ("schema", False)):
        table = infer_spec(apply, {"params": leaves, name: leaves}, X).table
        assert table["params/w"][1].groups
        assert (table[f"{name}/w"] == table["params/w"]) == moves


def test_a_leaf_that_fits_two_weights_belongs_to_neither():
    leaves = {"w": jnp.ones((3, 5)), "v": jnp.ones((5, 2))}
    tree = {"one": {"a": leaves}, "two": {"b": leaves}, "opt_state": {"mu": leaves}}

    def apply(tree, x):
        return sum(jnp.tanh(x @ t["w"]) @ t["v"] for t in (tree["one"]["a"], tree["two"]["b"]))

    table = infer_spec(apply, tree, X).table
    assert not any(axis.groups for path in ("opt_state/mu/w", "opt_state/mu/v") for axis in table[path])
    tree["opt_state"] = {"mu": {"b": leaves}}
    table = infer_spec(apply, tree, X).table
    assert table["opt_state/mu/b/w"] == table["two/b/w"] != table["one/a/w"]
