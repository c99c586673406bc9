"""Roles of leaves, as they come from the libraries that people train with."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from rebasin.errors import ConfigError, TreeError
from rebasin.roles import leaf_roles, weight_leaves
from rebasin.trees import leaf_table

X = jnp.ones((2, 3))


def by_role(tree, roles=None):
    found = leaf_roles(tree, roles)
    assert list(found) == list(leaf_table(tree))
    return {role: [path for path in found if found[path] == role] for role in set(found.values())}


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False)(nn.Dense(4)(x))


def test_variable_types_of_nnx():
    state = nnx.state(NnxNet(nnx.Rngs(0)))
    assert by_role(state) == {
        "weight": [
            "dense/bias/value",
            "dense/kernel/value",
            "norm/bias/value",
            "norm/scale/value",
        ],
        "statistic": ["norm/mean/value", "norm/var/value"],
        "counter": ["dropout/rngs/count/value"],
        "key": ["dropout/rngs/key/value"],
    }


def test_nnx_without_its_types_as_a_checkpoint_gives_it_back():
    pure = nnx.to_pure_dict(nnx.state(NnxNet(nnx.Rngs(0))))
    found = by_role(pure)
    assert found["statistic"] == ["norm/mean", "norm/var"]
    assert found["key"] == ["dropout/rngs/key"]
    assert found["counter"] == ["dropout/rngs/count"]


def test_optimisers_of_nnx_and_their_states():
    optimizer = nnx.Optimizer(NnxNet(nnx.Rngs(0)), optax.adam(1e-3), wrt=nnx.Param)
    found = by_role(nnx.state(optimizer))
    assert set(found) == {"optimiser state"}
    assert "opt_state/0/mu/dense/kernel/value" in found["optimiser state"]


def test_collections_of_linen_and_train_states():
    variables = LinenNet().init(jax.random.key(0), X)
    assert by_role(variables)["statistic"] == [
        "batch_stats/BatchNorm_0/mean",
        "batch_stats/BatchNorm_0/var",
    ]
    state = TrainState.create(apply_fn=None, params=variables["params"], tx=optax.adam(1e-3))
    found = by_role(state)
    assert found["counter"] == ["step"]
    assert "opt_state/0/mu/Dense_0/kernel" in found["optimiser state"]
    assert set(found["weight"]) == {f"params/{path}" for path in leaf_table(variables["params"])}


def test_whatever_an_optimiser_holds_is_its_state():
    variables = LinenNet().init(jax.random.key(0), X)
    found = by_role({"variables": variables, "opt_state": optax.adam(1e-3).init(variables)})
    moments = [path for path in found["optimiser state"] if path.startswith("opt_state/0/mu/params/")]
    assert len(moments) == len(leaf_table(variables["params"]))
    assert all(path.startswith("variables/params/") for path in found["weight"])


def test_averages_of_haiku():
    net = hk.transform_with_state(
        lambda x: hk.SpectralNorm()(hk.BatchNorm(True, True, 0.9)(hk.Linear(4)(x), True))
    )
    params, state = net.init(jax.random.key(0), X)
    assert by_role({"params": params, "state": state}) == {
        "weight": [f"params/{path}" for path in leaf_table(params)],
        "statistic": [
            "state/batch_norm/~/mean_ema/average",
            "state/batch_norm/~/mean_ema/hidden",
            "state/batch_norm/~/var_ema/average",
            "state/batch_norm/~/var_ema/hidden",
            "state/spectral_norm/sigma",
            "state/spectral_norm/u0",
        ],
        "counter": ["state/batch_norm/~/mean_ema/counter", "state/batch_norm/~/var_ema/counter"],
    }


class RunningNorm(nnx.BatchStat):
    """A kind of running statistic that a user made."""


class Unknown(nnx.Variable):
    """A kind of variable of which nothing is known."""


def test_other_types_of_nnx_have_the_role_of_their_base_or_of_their_name():
    module = nnx.Module()
    module.norm, module.running_mean, module.w = RunningNorm(X), Unknown(X), Unknown(X)
    assert by_role(nnx.state(module)) == {
        "statistic": ["norm/value", "running_mean/value"],
        "weight": ["w/value"],
    }


def test_state_of_equinox():
    norm, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="b", mode="batch")
    arrays = eqx.filter(norm, eqx.is_array)
    found = leaf_roles((arrays, state))
    assert {path: role for path, role in found.items() if path.startswith("0/")} == {
        "0/weight": "weight",
        "0/bias": "weight",
    }
    assert {role for path, role in found.items() if path.startswith("1/")} == {"statistic", "counter"}


def test_names_of_pytorch():
    tree = {
        "bn1.weight": np.ones(3),
        "bn1.running_mean": np.ones(3),
        "bn1.running_var": np.ones(3),
        "bn1.num_batches_tracked": np.array(7),
        "optimizer": {"state": {"0": {"exp_avg": np.ones(3), "step": np.array(1.0)}}},
    }
    assert by_role(tree) == {
        "weight": ["bn1.weight"],
        "statistic": ["bn1.running_mean", "bn1.running_var"],
        "counter": ["bn1.num_batches_tracked"],
        "optimiser state": ["optimizer/state/0/exp_avg", "optimizer/state/0/step"],
    }


def test_a_mean_is_a_statistic_beside_a_variance_of_its_shape_only():
    assert set(leaf_roles({"mean": np.ones(3)}).values()) == {"weight"}
    assert set(leaf_roles({"mean": np.ones(3), "var": np.ones(2)}).values()) == {"weight"}
    assert set(leaf_roles({"mean": np.ones(3), "var": np.ones(3)}).values()) == {"statistic"}
    # A variational layer has a mean and a variance for weights.
    assert set(leaf_roles({"params": {"mean": np.ones(3), "var": np.ones(3)}}).values()) == {"weight"}


@pytest.mark.parametrize(
    ("leaf", "role"),
    [
        (np.ones(3, np.float16), "weight"),
        (jnp.ones(3, jnp.float8_e4m3fn), "weight"),
        (np.ones(3, np.complex64), "weight"),
        (1.5, "weight"),
        (3, "counter"),
        (np.arange(3), "constant"),  # places in a table
        (np.ones(3, bool), "constant"),
        (np.ones((2, 2), np.int8), "weight"),  # quantised
        (jnp.ones((2, 2), jnp.int4), "weight"),
        (jax.random.key(0), "key"),
        (jax.ShapeDtypeStruct((3,), np.float32), "weight"),
    ],
)
def test_what_the_dtype_tells(leaf, role):
    assert leaf_roles({"w": leaf}) == {"w": role}


def test_a_key_of_two_numbers_is_told_by_its_name():
    key = jax.random.PRNGKey(0)
    assert leaf_roles({"rng": key, "pair": key}) == {"pair": "constant", "rng": "key"}


def test_stated_roles_come_first_and_the_longest_name_decides():
    tree = {"layers": [{"w": np.ones(2), "mask": np.ones(2)} for _ in range(2)], "batch_stats": np.ones(2)}
    stated = {"*/mask": "constant", "batch_stats": "weight", "layers/1": "counter"}
    assert leaf_roles(tree, stated) == {
        "batch_stats": "weight",
        "layers/0/mask": "constant",
        "layers/0/w": "weight",
        "layers/1/mask": "counter",
        "layers/1/w": "counter",
    }
    assert weight_leaves(tree, {"": "constant", "layers/0/w": "weight"}) == {"layers/0/w"}


def test_stars_stand_for_any_text_and_nothing_else_does():
    tree = {
        "block": {"norm": {"scale": np.ones(2)}, "w": np.ones(2)},
        "l.bias": np.ones(2),
        "l_bias": np.ones(2),
    }
    assert weight_leaves(tree, {"*/norm": "constant"}) == {"block/w", "l.bias", "l_bias"}
    assert weight_leaves(tree, {"*.bias": "constant"}) == {"block/norm/scale", "block/w", "l_bias"}


def test_roles_that_cannot_work_are_refused():
    with pytest.raises(ConfigError) as info:
        leaf_roles({"w": 1.0}, {"w": "buffer"})
    headline, problem = str(info.value).splitlines()
    assert headline.startswith("roles cannot work; the roles are 'weight', 'statistic', 'counter', ")
    assert problem == "  'w' has the role 'buffer'"
    with pytest.raises(ConfigError) as info:
        leaf_roles({"w": 1.0}, {"mask": "constant", "w": "weight"})
    assert str(info.value).splitlines() == [
        "roles do not fit the tree, whose leaves are ['w']:",
        "  'mask' names no leaf",
    ]


@pytest.mark.parametrize("leaf", [jnp.tanh, "text", np.array(["a"]), np.array([None]), object()])
def test_what_is_no_array_is_named(leaf):
    with pytest.raises(TreeError, match=r"neither arrays nor numbers(.|\n)*layer/act: "):
        leaf_roles({"layer": {"act": leaf, "w": np.ones(2)}})
