"""Programs inside equations: which equation is a call, and what lies inside."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from rebasin.inference.programs import called_program, inner_programs, iter_equations

X = jnp.ones(3)


def the_equation(function, *arguments):
    (eqn,) = jax.make_jaxpr(function)(*arguments).jaxpr.eqns
    return eqn


@jax.custom_vjp
def act(x):
    return jnp.tanh(x)


act.defvjp(lambda x: (act(x), x), lambda x, g: (g,))


@pytest.mark.parametrize(
    "function",
    [jax.jit(jnp.tanh), jax.checkpoint(jnp.tanh), act, jax.nn.relu, lax.composite(jnp.tanh, "my.tanh")],
    ids=["jit", "remat", "custom_vjp", "custom_jvp", "composite"],
)
def test_calls(function):
    eqn = the_equation(function, X)
    assert called_program(eqn) is not None
    assert len(inner_programs(eqn.params)) == 1


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (jnp.tanh, 0),
        (lambda x: lax.scan(lambda h, _: (jnp.tanh(h), None), x, length=2)[0], 1),
        (lambda x: lax.while_loop(lambda h: h[0] < 0, jnp.tanh, x), 2),
        (lambda x: lax.reduce_window(x, 1.0, lambda a, b: a * b, (2,), (1,), "VALID"), 1),
    ],
    ids=["tanh", "scan", "while", "reduce_window"],
)
def test_equations_that_are_no_calls(function, count):
    eqn = the_equation(function, X)
    assert called_program(eqn) is None
    assert len(inner_programs(eqn.params)) == count


def test_equations_at_every_depth():
    @jax.jit
    def function(x):
        def step(h, _):
            return jnp.tanh(h), None

        return lax.scan(step, lax.cond(x[0] > 0, jnp.sin, jnp.cos, x), length=2)[0]

    closed = jax.make_jaxpr(function)(X)
    every = [eqn.primitive.name for eqn in iter_equations(closed)]
    outside = [eqn.primitive.name for eqn in iter_equations(closed, loops=False)]
    assert {"scan", "cond", "sin", "cos", "tanh"} <= set(every)
    assert [name for name in every if name != "tanh"] == outside
