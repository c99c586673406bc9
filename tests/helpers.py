"""Small networks, random trees and comparisons with hand-made specs, shared by the tests of several rooms."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from rebasin import PermutationSpec, infer_spec, verify_spec
from rebasin.batches import Batch
from rebasin.models import MLP, ViT
from rebasin.permutation import random_permutation


class Case(NamedTuple):
    """A model with its spec, two networks, and data whose labels are the outputs of network A.

    The loss is the squared difference from the labels, so the loss of A is zero.
    """

    spec: PermutationSpec
    apply_fn: Callable[..., jax.Array]
    params_a: Any
    params_b: Any  # another network
    planted: Any  # A with its units permuted
    data: Batch

    def metrics_fn(self, params, batch):
        outputs = self.apply_fn(params, batch.inputs)
        return {"loss": jnp.mean((outputs - batch.labels) ** 2, axis=-1)}


class _ResidualBlock(nn.Module):
    channels: int
    stride: int

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.relu(nn.LayerNorm()(nn.Conv(self.channels, (3, 3), strides=strides)(x)))
        y = nn.LayerNorm()(nn.Conv(self.channels, (3, 3))(y))
        if self.stride != 1:
            x = nn.Conv(self.channels, (1, 1), strides=strides, name="shortcut")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """A block that keeps its width and one that doubles it."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(5, (3, 3))(x))
        x = _ResidualBlock(5, 1)(x)
        x = _ResidualBlock(7, 2)(x)
        return nn.Dense(3)(x.mean(axis=(1, 2)))


class ComplexMLP(nn.Module):
    """A chain of complex layers whose moduli are gated; its outputs are real parts."""

    @nn.compact
    def __call__(self, x):
        for width in (7, 6):
            x = nn.Dense(width, param_dtype=jnp.complex64)(x.reshape(len(x), -1))
            x = x * nn.sigmoid(jnp.abs(x))
        return nn.Dense(3, param_dtype=jnp.complex64)(x).real


class FusedAttention(nn.Module):
    """Two heads whose queries, keys and values are fused head by head; half of each query and key turns."""

    @nn.compact
    def __call__(self, x):
        q, k, v = jnp.split(nn.Dense(24)(x).reshape(*x.shape[:-1], 2, 12), 3, axis=-1)
        angles = jnp.arange(x.shape[-2], dtype=x.dtype)[:, None, None]

        def turn(z):
            a, b, rest = z[..., :1], z[..., 1:2], z[..., 2:]
            cos, sin = (jnp.broadcast_to(f(angles), a.shape) for f in (jnp.cos, jnp.sin))
            return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)

        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", turn(q), turn(k)))
        return nn.DenseGeneral(3, axis=(-2, -1))(jnp.einsum("bhqk,bkhd->bqhd", weights, v)).mean(1)


MODELS = {
    "mlp": (lambda: MLP((9, 8), 3), (3, 2, 1)),
    "width_one": (lambda: MLP((1, 4, 1), 3), (3, 2, 1)),
    "resnet": (ResNet, (4, 4, 2)),
    "complex": (ComplexMLP, (3, 2, 1)),
    "vit": (lambda: ViT(width=8, num_classes=3, depth=1, num_heads=2), (4, 4, 1)),
    "fused": (FusedAttention, (5, 6)),
}


@functools.cache
def build_case(name: str) -> Case:
    build, shape = MODELS[name]
    model = build()
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, *shape)).astype(np.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x[:1])

    def draw_leaf(leaf):
        real = rng.normal(size=leaf.shape).astype(np.float32)
        if not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            return real
        return (real + 1j * rng.normal(size=leaf.shape)).astype(leaf.dtype)

    def draw():  # every leaf random: zero biases and unit scales hide mistakes
        return jax.tree.map(draw_leaf, variables)

    params_a, params_b = draw(), draw()
    spec = rebasin.infer_spec(model.apply, variables, x[:1])
    planted = rebasin.permute(spec, random_permutation(spec, params_a, key=jax.random.key(1)), params_a)
    apply_fn = jax.jit(model.apply)
    data = Batch(x, np.asarray(apply_fn(params_a, x)))
    return Case(spec, apply_fn, params_a, params_b, planted, data)


X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def random_tree(**shapes):
    """A flat tree of random float32 leaves."""
    rng = np.random.default_rng(1)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def check(function, params, *inputs, indexed=None, fixed=(), **expected):
    """Infers, verifies in float64, and compares with the table expected, whatever the groups are called."""
    spec = infer_spec(function, params, *inputs)
    verify_spec(spec, function, params, *inputs)
    wanted = PermutationSpec.from_axes(expected, indexed=indexed, fixed=fixed)
    assert spec.equivalent(wanted), f"inferred:\n{spec}\nwanted:\n{wanted}"
    return spec


class _Compilations:
    """Listens to JAX's own count of compilations, which needs no name that is not public."""

    def __init__(self):
        self.lists = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, duration, **details):
        if event.endswith("backend_compile_duration"):
            for found in self.lists:
                found.append(duration)


_compilations = functools.cache(_Compilations)


@contextlib.contextmanager
def count_compilations():
    """Yields a list that gets an entry for every program compiled inside."""
    found = []
    _compilations().lists.append(found)
    try:
        yield found
    finally:
        _compilations().lists.remove(found)
