"""The fused attention of a GPU has the axes of attention that is written out.

The kernel runs on a GPU only, but it can be traced without one once JAX believes that cuDNN is there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import random_tree

from rebasin import infer_spec, verify_spec

kernel = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")

X = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 6)), jnp.float32)
LONGER = jnp.asarray(np.random.default_rng(1).normal(size=(3, 8, 6)), jnp.float32)


@pytest.fixture(autouse=True)
def pretend_cudnn(monkeypatch):
    """The version is asked for, and shapes are checked against the device, before anything is traced."""
    monkeypatch.setattr(kernel, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(kernel, "check_is_flash_attention", lambda *args: None)


def network(implementation, **options):
    """Two heads of keys with two queries each, of four dimensions, or as many as the weights say."""

    def function(t, x):
        q, k, v = (jnp.einsum("bti,ihd->bthd", x, t[name]) for name in "qkv")
        kind = jnp.bfloat16 if implementation == "cudnn" else x.dtype  # the kernel takes no other type
        bias = t["bias"][None, :, None, None].astype(kind) if "bias" in t else None
        if bias is not None:
            bias = jnp.broadcast_to(bias, (1, q.shape[2], x.shape[1], x.shape[1]))
        out = jax.nn.dot_product_attention(
            *(value.astype(kind) for value in (q, k, v)), bias, implementation=implementation, **options
        )
        return jnp.einsum("bthd,hdo->bto", out.astype(x.dtype), t["o"])

    return function


PLAIN = {"q": (6, 2, 8), "k": (6, 2, 8), "v": (6, 2, 8), "o": (2, 8, 3)}
GROUPED = {"q": (6, 4, 8), "k": (6, 2, 8), "v": (6, 2, 8), "o": (4, 8, 3)}


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        (PLAIN, {}),
        (GROUPED, {}),
        (PLAIN | {"bias": (2,)}, {}),
        (PLAIN, {"is_causal": True}),
    ],
    ids=["plain", "grouped queries", "bias for each head", "causal"],
)
def test_the_kernel_has_the_spec_of_attention_written_out(shapes, options):
    tree = random_tree(**shapes)
    fused = infer_spec(network("cudnn", **options), tree, X)
    written_out = network("xla", **options)
    assert fused.groups
    assert fused.equivalent(infer_spec(written_out, tree, X)), str(fused)
    verify_spec(fused, written_out, tree, LONGER)


def test_positions_that_weights_make_are_tied_as_in_attention_written_out():
    """Keys and values of learned slots: the slots move, unless a mask tells them apart."""

    def function(implementation, **options):
        attend = network(implementation, **options)

        def slots(t, x):
            return attend({**t, "o": t["o"]}, t["slots"] + 0 * x[:1, :1])

        return lambda t, x: slots(t, x).mean(1)

    tree = random_tree(**PLAIN, slots=(1, 5, 6))
    fused = infer_spec(function("cudnn"), tree, X)
    assert fused.table["slots"][1].groups
    assert fused.equivalent(infer_spec(function("xla"), tree, X))
    masked = infer_spec(function("cudnn", is_causal=True), tree, X)
    assert masked.table["slots"][1].groups == ()


def test_positions_of_keys_and_values_from_other_weights_are_tied():
    def function(implementation):
        kind = jnp.bfloat16 if implementation == "cudnn" else jnp.float32

        def apply(t, x):
            q = jnp.einsum("bti,ihd->bthd", x, t["q"]).astype(kind)
            k, v = (
                jnp.broadcast_to(t[n], (len(x), *t[n].shape[1:])).astype(kind) for n in ("keys", "values")
            )
            out = jax.nn.dot_product_attention(q, k, v, implementation=implementation)
            return jnp.einsum("bthd,hdo->bto", out.astype(x.dtype), t["o"])

        return apply

    tree = random_tree(q=(6, 2, 8), keys=(1, 7, 2, 8), values=(1, 7, 2, 8), o=(2, 8, 3))
    fused = infer_spec(function("cudnn"), tree, X)
    assert fused.table["keys"][1].groups == fused.table["values"][1].groups != ()
    assert fused.equivalent(infer_spec(function("xla"), tree, X)), str(fused)


def test_gradients_of_the_kernel():
    def gradient(implementation):
        function = network(implementation)
        return lambda t, x: jax.grad(lambda x: function(t, x).sum())(x)

    tree = random_tree(**PLAIN)
    fused = infer_spec(gradient("cudnn"), tree, X)
    assert fused.groups
    assert fused.equivalent(infer_spec(gradient("xla"), tree, X)), str(fused)
