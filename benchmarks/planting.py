"""Networks of Gaussian weights, and planted permutations of them that matching has to find again."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from rebasin.models import MLP, VGG16, ResNet20, ViT

__all__ = ["PLANTED", "Architecture", "ResidualMLP", "draw_network", "is_recovered", "plant"]


class ResidualMLP(nn.Module):
    """A dense layer into a residual stream, blocks of two dense layers beside it, and a dense layer out.

    Attributes:
      blocks: number of blocks.
      width: of the stream and of the hidden layers.
      num_classes: number of logits.
    """

    blocks: int
    width: int = 64
    num_classes: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [n, num_classes] of inputs [n, d]."""
        x = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        return nn.Dense(self.num_classes)(x)


class Architecture(NamedTuple):
    """A model and what it is applied to.

    Attributes:
      model: the Flax module.
      input_shape: of one batch.
    """

    model: nn.Module
    input_shape: tuple[int, ...]

    @functools.cache  # noqa: B019  an architecture is a constant
    def trace(self) -> tuple[rebasin.PermutationSpec, Any]:
        """The inferred spec, and the shapes of the tree it is for."""
        x = jax.ShapeDtypeStruct(self.input_shape, jnp.float32)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), x)
        return rebasin.infer_spec(self.model.apply, shapes, x), shapes


_CIFAR = (1, 32, 32, 3)

# What a planted permutation has to be found in, whatever the seed. The MLPs have few inputs, so that little
# tells their first units apart: that is where ascents from the identity get stuck.
PLANTED: Mapping[str, Architecture] = {
    "MLP 8-64×4-4": Architecture(MLP((64,) * 4, 4), (1, 1, 1, 8)),
    "residual MLP, 4 blocks": Architecture(ResidualMLP(4), (1, 8)),
    "residual MLP, 8 blocks": Architecture(ResidualMLP(8), (1, 8)),
    "ResNet-20 width 8": Architecture(ResNet20(8, 10), _CIFAR),
    "VGG-16 width 8": Architecture(VGG16(8, 10), _CIFAR),
    "ViT width 32": Architecture(ViT(32, 10, num_heads=4), (1, 8, 8, 1)),
}


def draw_network(shapes: Any, seed: int) -> Any:
    """A tree of those shapes with independent standard normal values, biases and scales of norms included."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)


def plant(architecture: Architecture, seed: int) -> tuple[rebasin.PermutationSpec, Any, Any]:
    """A spec, a network, and the network with its units in random order."""
    spec, shapes = architecture.trace()
    a = draw_network(shapes, seed)
    return spec, a, rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)


def is_recovered(spec: rebasin.PermutationSpec, a: Any, b: Any, permutation: Mapping[str, Any]) -> bool:
    """Whether a permutation of B gives A, every leaf bit for bit."""
    moved = rebasin.permute(spec, permutation, b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True))
