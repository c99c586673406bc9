"""The benchmark of bfloat16: its networks compute in it, and its table holds both precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.precision import MEASURES, PRECISIONS, HalfPrecision, half_precision_model, measure
from rebasin.models import MLP, MODELS
from rebasin.training.data import load_dataset
from rebasin.training.recipes import Recipe

RECIPE = Recipe("digits", "mlp", width=4, epochs=2, num_train=64, batch_size=32, warmup_epochs=1)


def test_a_model_in_half_precision_rounds_its_weights_and_inputs():
    module, x = MLP((5,), 3), jnp.linspace(0, 1, 64).reshape(1, 8, 8, 1)
    variables = module.init(jax.random.key(0), x)
    logits = HalfPrecision(module).apply(variables, x)
    assert logits.dtype == jnp.float32
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (variables, x))
    np.testing.assert_array_equal(logits, module.apply(*rounded).astype(jnp.float32))
    assert not np.array_equal(logits, module.apply(variables, x))


@pytest.mark.slow
def test_both_precisions_are_trained_and_measured():
    known = dict(MODELS)
    results = measure(RECIPE, load_dataset("digits"), (0, 2), num_eval=50, num_alphas=3)
    assert known == MODELS
    assert list(results["values"]) == [f"{trained}, {in_}" for trained in PRECISIONS for in_ in PRECISIONS]
    for row in results["values"].values():
        assert {what: len(values) for what, values in row.items()} == dict.fromkeys(MEASURES, 2)
    one, other = (results["values"][f"{name}, float32"] for name in PRECISIONS)
    assert one != other
    # An epoch after the first, of two networks in each of two pairs.
    assert {name: len(values) for name, values in results["seconds"].items()} == dict.fromkeys(PRECISIONS, 4)


def test_a_model_is_registered_while_it_is_needed():
    with half_precision_model("mlp") as name:
        assert MODELS[name](4, 10) == HalfPrecision(MODELS["mlp"](4, 10))
    assert name not in MODELS
