"""How an architecture enters the zoo: its function as shapes, and the sizes of its groups.

An exhibit builds a `Specimen` from shapes alone: nothing is initialised or compiled. Sizes are sorted by
`sort_key`. The size of an inner group is a tuple, first the sizes of its outer groups: ``(2, 4)`` are four
head dimensions in each of two heads.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from rebasin.trees import map_leaves

KEY = jax.eval_shape(lambda: jax.random.key(0))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(**sizes):
    return {name: shape(*size) for name, size in sizes.items()}


VECTORS = shape(2, 3)
IMAGES = shape(2, 8, 8, 3)
SEQUENCES = shape(2, 5, 6)
TOKENS = shape(2, 5, dtype=jnp.int32)


class Specimen(NamedTuple):
    """Arguments of `infer_spec`, as shapes."""

    function: Callable[..., Any]
    tree: Any
    inputs: tuple[Any, ...]
    state_outputs: Mapping[str, str] | None = None


class Exhibit(NamedTuple):
    """An architecture: how to build it, the sizes of its groups, and the module it stands in."""

    build: Callable[[], Specimen]
    sizes: tuple[int | tuple[int, ...], ...]
    family: str


EXHIBITS: dict[str, Exhibit] = {}


def exhibit(*sizes):
    """Decorator that enters a function that builds a specimen, with the sizes of its groups."""

    def enter(build):
        EXHIBITS[build.__name__] = Exhibit(build, sizes, build.__module__)
        return build

    return enter


def linen(*sizes, inputs, **options):
    """Decorator that enters a function of `nn.compact` layers, with the sizes of its groups."""

    def enter(layers):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, *args):
                return layers(*args)

        def build():
            tree = jax.eval_shape(Model().init, KEY, *inputs)
            return Specimen(functools.partial(Model().apply, **options), tree, inputs)

        EXHIBITS[layers.__name__] = Exhibit(build, sizes, layers.__module__)
        return layers

    return enter


def sort_key(size):
    """Key that sorts plain groups by size, then inner groups by size."""
    return (1, *size) if isinstance(size, tuple) else (0, size)


def arrays(tree, seed=0):
    """Random values for shapes: normal, positive if a name says that it is a variance, or small integers."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 2 if leaf.dtype == bool else 5, size=leaf.shape), leaf.dtype)
        values = 0.5 * rng.normal(size=leaf.shape)
        is_variance = path.endswith("var") or "/nu/" in path
        return jnp.asarray(np.abs(values) + 0.1 if is_variance else values, leaf.dtype)

    return map_leaves(fill, tree)
