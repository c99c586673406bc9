"""New norm statistics in trees of several libraries, and what cannot be measured is refused."""

import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rebasin import build_norm_reset
from rebasin.errors import ConfigError
from rebasin.trees import leaf_table

# Two halves whose means differ, so that the variance of the batches' means counts.
X = jnp.concatenate([jax.random.normal(jax.random.key(k), (32, 5)) + 3 * k for k in (0, 1)])


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense, self.norm = nnx.Linear(5, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize("pure", [False, True])
def test_nnx_with_and_without_its_variable_types(pure):
    graph, state = nnx.split(NnxNet(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state) if pure else state

    def update(params, x):
        variables = state
        if pure:
            variables = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(params))
        model = nnx.merge(graph, variables if pure else params)
        model.train()
        model(x)
        new = nnx.state(model)
        return nnx.to_pure_dict(new) if pure else new

    table = leaf_table(build_norm_reset(params, update, X, batch_size=32)(params))
    y = np.asarray(X, np.float64) @ np.asarray(state["dense"]["kernel"][...], np.float64)
    end = "" if pure else "/value"
    np.testing.assert_allclose(table[f"norm/mean{end}"], y.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(table[f"norm/var{end}"], y.var(0), rtol=1e-3)


@pytest.mark.parametrize(
    "names", [("bn1.running_mean", "bn1.running_var"), ("moving_mean", "moving_variance")]
)
def test_names_of_other_libraries(names):
    mean, var = names
    params = {"w": jax.random.normal(jax.random.key(1), (5, 4)), mean: jnp.zeros(4), var: jnp.ones(4)}

    def update(params, x):
        y = x @ params["w"]
        measured = {mean: y.mean(0), var: y.var(0)}
        return params | {name: 0.9 * params[name] + 0.1 * measured[name] for name in names}

    new = build_norm_reset(params, update, X, batch_size=32)(params)
    y = np.asarray(X @ params["w"], np.float64)
    np.testing.assert_allclose(new[mean], y.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(new[var], y.var(0), rtol=1e-3)


def test_a_momentum_that_depends_on_a_counter():
    """An average over all batches so far, as PyTorch's with momentum=None, at the counter of `params`."""

    def update(params, x):
        step = params["num_batches_tracked"] + 1
        mean = params["running_mean"] + (x.mean(0) - params["running_mean"]) / step
        return {"running_mean": mean, "num_batches_tracked": step}

    early, late = ({"running_mean": jnp.ones(5), "num_batches_tracked": jnp.asarray(n)} for n in (3, 900))
    new = build_norm_reset(early, update, X, batch_size=32)(late)
    np.testing.assert_allclose(new["running_mean"], X.mean(0), rtol=1e-3, atol=1e-4)
    assert new["num_batches_tracked"] == 900


def test_debiased_averages_are_refused():
    net = hk.without_apply_rng(
        hk.transform_with_state(lambda x: hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), is_training=True))
    )
    params, state = net.init(jax.random.key(0), X)
    tree = {"params": params, "state": state}

    def update(tree, x):
        return tree | {"state": net.apply(tree["params"], tree["state"], x)[1]}

    with pytest.raises(ConfigError, match=r"as a moving average does(.|\n)*mean_ema/average") as info:
        build_norm_reset(tree, update, X)
    assert "var_ema/average" in str(info.value)
    assert "hidden" not in str(info.value)


class Spectral(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.SpectralNorm(nn.Dense(6))(x, update_stats=train)
        return nn.BatchNorm(use_running_average=not train)(x)


def test_power_iterations_are_refused_and_can_be_left_out():
    model = Spectral()
    tree = model.init(jax.random.key(0), X)

    def update(tree, x):
        return tree | model.apply(tree, x, train=True, mutable=["batch_stats"])[1]

    with pytest.raises(ConfigError, match="SpectralNorm_0/Dense_0/kernel/u"):
        build_norm_reset(tree, update, X)
    new = build_norm_reset(tree, update, X, roles={"*/SpectralNorm_0": "constant"})(tree)
    norms = {path: leaf for path, leaf in leaf_table(tree).items() if "SpectralNorm_0" in path}
    assert norms
    for path, leaf in norms.items():
        np.testing.assert_array_equal(leaf_table(new)[path], leaf)
    trained = model.apply(tree, X, train=True, mutable=["batch_stats"])[0]
    np.testing.assert_allclose(model.apply(new, X), trained, atol=2e-2)


def test_statistics_that_are_measured_through_others_are_refused():
    """The first norm runs in evaluation mode, so what the second measures depends on its statistics."""

    def update(params, x):
        y = x - params["first"]["running_mean"][None]
        mean = 0.9 * params["second"]["running_mean"] + 0.1 * y.mean(0)
        return params | {"second": {"running_mean": mean}}

    params = {name: {"running_mean": jnp.zeros(5)} for name in ("first", "second")}
    with pytest.raises(ConfigError, match="second/running_mean"):
        build_norm_reset(params, update, X)


@pytest.mark.parametrize("momentum", [-0.5, 1.0, 1.5])
def test_momenta_that_no_average_has_are_refused(momentum):
    """With 1 it is a sum over all batches."""

    def update(params, x):
        return {"running_mean": momentum * params["running_mean"] + x.mean(0)}

    with pytest.raises(ConfigError, match=r"as a moving average does(.|\n)*running_mean"):
        build_norm_reset({"running_mean": jnp.zeros(5)}, update, X)


@pytest.mark.parametrize("name", ["scale", "running_mean"])
def test_a_reset_with_nothing_to_replace_is_an_error(name):
    with pytest.raises(
        ConfigError, match=r"there is nothing to reset: update_fn changes no statistic"
    ) as info:
        build_norm_reset({name: jnp.ones(5)}, lambda params, x: params, X)
    assert ("(statistics: none)" in str(info.value)) == (name == "scale")
