"""A multilayer perceptron."""

from collections.abc import Sequence

import flax.linen as nn
import jax

__all__ = ["MLP"]


class MLP(nn.Module):
    """Dense layers with ReLU between them.

    The layers are named ``Dense_0`` to ``Dense_k``: k hidden layers, then the output layer.

    Attributes:
      features: width of each hidden layer.
      num_classes: number of logits.
    """

    features: Sequence[int] = (512, 512, 512)
    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, [n, num_classes], of images [n, h, w, c]."""
        x = images.reshape(len(images), -1)
        for width in self.features:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.num_classes)(x)
