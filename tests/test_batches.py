import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rebasin.batches import (
    Batch,
    Batches,
    Sum,
    check_counts,
    check_data,
    inputs_of,
    map_batches,
    sum_batches,
    to_batches,
)
from rebasin.errors import ConfigError, DataError


@given(st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=10)
def test_every_example_counts_once(n, batch_size):
    data = {"x": jnp.arange(n, dtype=jnp.float32)}
    batches = Batches.of(data, batch_size)
    assert batches.sizes.sum() == n
    assert batches.sizes.max() <= batch_size
    total = jax.jit(lambda d: sum_batches(lambda b: {"s": b["x"].sum(), "n": jnp.ones(())}, d, batches))(data)
    assert total.value()["s"] == n * (n - 1) / 2
    assert total.value()["n"] == len(batches.sizes)
    firsts = map_batches(
        lambda b, extra: (b["x"][0], extra), data, batches, extras=jnp.asarray(batches.sizes)
    )
    np.testing.assert_array_equal(firsts[0], np.cumsum([0, *batches.sizes[:-1]]))
    np.testing.assert_array_equal(firsts[1], batches.sizes)


def test_sum_is_as_exact_as_float64():
    """Terms of one sign: a plain float32 sum of 100,000 of them is wrong in its fourth digit."""
    values = jnp.asarray(np.random.default_rng(0).uniform(0.5, 1.5, size=100_000), jnp.float32)
    total = jax.jit(lambda v: sum_batches(jnp.sum, v, Batches.of(v, 1)))(values)
    np.testing.assert_allclose(total.value(), np.asarray(values, np.float64).sum(), rtol=1e-9)
    naive = jax.lax.scan(lambda s, v: (s + v, None), jnp.float32(0), values)[0]
    assert abs(naive - np.asarray(values, np.float64).sum()) > 1e-6 * total.value()


def test_sum_of_trees():
    one = Sum({"a": jnp.zeros(2), "b": (jnp.zeros(()),)}, {"a": jnp.zeros(2), "b": (jnp.zeros(()),)})
    two = one.add({"a": jnp.ones(2), "b": (jnp.full((), 3.0),)})
    assert two.value()["b"][0] == 3
    np.testing.assert_array_equal(two.value()["a"], [1, 1])


def test_the_last_batch_is_filled_up_with_real_data():
    """A function that is infinite at zero stays finite on all that it is given."""
    filled = to_batches({"x": jnp.arange(1.0, 6.0)}, 4)["x"]
    assert filled.tolist() == [[1, 2, 3, 4], [5, 1, 1, 1]]


def test_inputs_are_what_the_network_takes_after_its_parameters():
    x, y, labels = jnp.ones(2), jnp.zeros(2), jnp.arange(2)
    for data in (x, (x,), Batch(x), Batch((x,), labels)):
        assert len(inputs_of(data)) == 1
        assert inputs_of(data)[0] is x
    assert inputs_of(Batch((x, y), labels)) == (x, y)
    assert inputs_of(Batch({"image": x, "mask": y})) == ({"image": x, "mask": y},)


def test_labels_may_be_left_out():
    check_data(Batch(jnp.ones((2, 3))), 1)
    check_data(Batch((jnp.ones((2, 3)), jnp.ones(2)), jnp.arange(2)), 1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": jnp.ones((2, 1)), "y": jnp.ones(3)}, "one common n:\n  x: 2 examples\n  y: 3 examples"),
        ({"x": jnp.ones(())}, "x: scalar"),
        (Batch(jnp.ones((2, 1)), jnp.ones(3)), "one common n:\n  inputs: 2 examples\n  labels: 3 examples"),
        ({"x": jnp.ones((0, 3))}, "hold no examples"),
        ({}, "no arrays"),
    ],
)
def test_data_that_do_not_fit(data, message):
    with pytest.raises(DataError, match=message):
        check_data(data, 1)


def test_empty_batch():
    with pytest.raises(ConfigError, match="batch_size must be at least 1, got 0"):
        check_data(jnp.ones(3), 0)


def test_counts_are_integers():
    check_counts(1, n=np.int32(1), m=7)
    for count in (2.0, True, "2", None):
        with pytest.raises(ConfigError, match=f"m must be an integer, got {count!r}"):
            check_counts(1, n=1, m=count)
    with pytest.raises(ConfigError, match="m must be at least 2, got 1"):
        check_counts(2, n=2, m=1)
