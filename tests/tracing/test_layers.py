"""Affine epilogues: how far the output of a layer is only scaled and shifted."""

import jax
import jax.numpy as jnp
import pytest

import rebasin
from rebasin.models import build_model
from rebasin.tracing.program import trace_program
from rebasin.tracing.sites import find_layers

TREE = {"w": jnp.ones((4, 6)), "b": jnp.arange(6.0), "p": jnp.ones((3, 6)), "v": jnp.ones((6, 2))}
X = jnp.ones((5, 3, 4))

# How the first layer's output goes on, and the last operation that only scales and shifts its channels.
FORMS = {
    "no bias": (lambda y, t: jnp.tanh(y), "dot_general"),
    "bias": (lambda y, t: jnp.tanh(y + t["b"][None, None]), "add"),
    "bias in full": (lambda y, t: jnp.tanh(y + jnp.broadcast_to(t["b"], y.shape)), "add"),
    "scale and shift": (lambda y, t: jnp.tanh((2 - y * t["b"][None, None]) / t["b"][None, None]), "div"),
    "sign": (lambda y, t: jnp.tanh(-y), "neg"),
    "positions": (lambda y, t: jnp.tanh(y + t["p"][None]), "dot_general"),
    "divisor": (lambda y, t: jnp.tanh(1 / y), "dot_general"),
    "read twice": (lambda y, t: (y + t["b"][None, None]) * jax.nn.sigmoid(y), "dot_general"),
    "read twice behind the bias": (lambda y, t: (z := y + t["b"][None, None]) * jnp.tanh(z), "add"),
    "data beside it": (lambda y, t: jnp.tanh(y + jnp.mean(y, 0, keepdims=True)), "dot_general"),
}


@pytest.mark.parametrize("form", FORMS)
def test_where_the_affine_epilogue_ends(form):
    function, expected = FORMS[form]

    def network(tree, x):
        return function(x @ tree["w"], tree) @ tree["v"]

    spec = rebasin.infer_spec(network, TREE, X)
    program = trace_program(spec, network, TREE, X)
    first, last = find_layers(program)
    (at,) = first.end
    assert program.closed.jaxpr.eqns[at].primitive.name == expected
    assert last.end == last.address


@pytest.mark.parametrize(("name", "length"), [("resnet20", 0), ("resnet20_batchnorm", 3)])
def test_norms_of_models(name, length):
    """LayerNorm reads its input twice; BatchNorm subtracts, multiplies and adds."""
    model, image = build_model(name, width=2, num_classes=3), jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    program = trace_program(rebasin.infer_spec(model.apply, shapes, image), model.apply, shapes, image)
    affine = {"sub", "mul", "add"}
    for layer in find_layers(program)[:-1]:  # the last one's are the logits
        equations = program.closed.jaxpr.eqns[layer.address[0] + 1 : layer.end[0] + 1]
        epilogue = [eqn for eqn in equations if eqn.outvars[0].aval.shape[:3] != (1, 1, 1)]
        assert len(epilogue) == length
        assert {eqn.primitive.name for eqn in epilogue} == (affine if length else set())
