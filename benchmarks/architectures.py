"""Models with their specs, and networks of Gaussian weights.

Nothing here may use what only the newest library has: `benchmarks.against_version` and `benchmarks.house` run
this file with older ones as well.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from rebasin.errors import ConfigError
from rebasin.models import MLP, VGG16, ResNet20

__all__ = [
    "CIFAR_SHAPE",
    "GPT",
    "WIDTHS",
    "Architecture",
    "BottleneckResNet",
    "ResidualMLP",
    "build_architecture",
    "draw_network",
]

CIFAR_SHAPE = (1, 32, 32, 3)


class ResidualMLP(nn.Module):
    """A dense layer into a residual stream, blocks of two dense layers beside it, and a dense layer out.

    Attributes:
      blocks: number of blocks.
      width: number of units of the stream and of each hidden layer.
      num_classes: number of logits.
    """

    blocks: int
    width: int = 64
    num_classes: int = 4

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits [n, num_classes] of inputs [n, d]."""
        x = nn.Dense(self.width)(x)
        for _ in range(self.blocks):
            x = x + nn.Dense(self.width)(nn.relu(nn.Dense(self.width)(x)))
        return nn.Dense(self.num_classes)(x)


class GPT(nn.Module):
    """A causal transformer with learned positions, whose embedding is also its output layer.

    Attributes:
      depth: number of blocks of attention and MLP.
      width: number of units of the residual stream.
      heads: number of attention heads.
      vocabulary: number of tokens.
    """

    depth: int
    width: int = 1024
    heads: int = 16
    vocabulary: int = 50_257

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Return the logits [n, t, vocabulary] of tokens [n, t]."""
        embed = nn.Embed(self.vocabulary, self.width)
        length = tokens.shape[1]
        x = embed(tokens) + self.param("positions", nn.initializers.normal(), (length, self.width))[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
            y = nn.LayerNorm()(x)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(y)))
        return embed.attend(nn.LayerNorm()(x))


class BottleneckResNet(nn.Module):
    """ResNet-50, -101 or -152 with LayerNorm.

    Attributes:
      stages: number of blocks of each stage.
    """

    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the logits [n, 1000] of images [n, h, w, c]."""
        x = nn.relu(nn.LayerNorm()(nn.Conv(64, (7, 7), strides=2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.stages):
            for block in range(depth):
                stride, width = 2 if block == 0 and stage > 0 else 1, 64 * 2**stage
                y = nn.relu(nn.LayerNorm()(nn.Conv(width, (1, 1), use_bias=False)(x)))
                y = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(y)))
                y = nn.LayerNorm()(nn.Conv(4 * width, (1, 1), use_bias=False)(y))
                if block == 0:
                    x = nn.LayerNorm()(nn.Conv(4 * width, (1, 1), strides=stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


class Architecture(NamedTuple):
    """A model and what it is applied to.

    Attributes:
      model: the Flax module.
      input_shape: shape of one batch of inputs.
      input_dtype: dtype of the inputs.
    """

    model: nn.Module
    input_shape: tuple[int, ...]
    input_dtype: Any = jnp.float32

    @functools.cache  # noqa: B019  an architecture is a constant
    def trace(self) -> tuple[rebasin.PermutationSpec, Any]:
        """Return the inferred spec, and the shapes of the variables that it is for."""
        x = jax.ShapeDtypeStruct(self.input_shape, self.input_dtype)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), x)
        return rebasin.infer_spec(self.model.apply, shapes, x), shapes


# By model, the widths that `make bench` matches with Gaussian weights. ResNet-20 of width 64 is ×4 in
# git-re-basin's count, 256 is ×16.
WIDTHS: Mapping[str, tuple[int, ...]] = {"mlp": (512,), "vgg16": (8, 16, 64), "resnet20": (16, 64, 256)}

_BUILDERS: Mapping[str, Callable[[int], Architecture]] = {
    "mlp": lambda width: Architecture(MLP((width,) * 3), (1, 28, 28, 1)),
    "vgg16": lambda width: Architecture(VGG16(width), CIFAR_SHAPE),
    "resnet20": lambda width: Architecture(ResNet20(width), CIFAR_SHAPE),
    # Four blocks with heads of 32 units, and few tokens: attention, not the embedding, should take the time.
    "gpt": lambda width: Architecture(GPT(4, width, width // 32, 4096), (1, 32), jnp.int32),
}


@functools.cache
def build_architecture(name: str) -> Architecture:
    """Return the architecture that a name such as ``"vgg16:8"`` stands for: a model and its width.

    Raises:
      ConfigError: there is no such model, or the width is not a positive number.
    """
    model, _, width = name.partition(":")
    if model not in _BUILDERS or not width.isdecimal() or int(width) < 1:
        models = ", ".join(_BUILDERS)
        raise ConfigError(f"wanted model:width, model one of {models}, such as vgg16:8; got {name!r}")
    return _BUILDERS[model](int(width))


def draw_network(shapes: Any, seed: int) -> Any:
    """Draw every leaf of a tree, biases and scales of norms too, from the standard normal distribution."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape, np.float32)), shapes)
