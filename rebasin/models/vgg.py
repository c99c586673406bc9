"""VGG-16, by default with LayerNorm as git-re-basin has it (arXiv 2209.04836)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rebasin.models.convolution import conv_general_dilated
from rebasin.models.norms import NormFactory

__all__ = ["VGG16", "max_pool", "pad_to"]

# Number of channels of each convolution, in units of `width`; "M" is a max pool.
_PLAN = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")

# Five pools halve an image five times: 32 pixels become one, and a smaller image would vanish.
_MIN_EXTENT = 32


class VGG16(nn.Module):
    """Thirteen convolutions, each followed by a norm, and three dense layers.

    Smaller images are padded with zeros on all sides to 32×32. Layers are named ``Conv_0`` to ``Conv_12``,
    ``LayerNorm_0`` to ``LayerNorm_12`` (or ``BatchNorm_0`` …) and ``Dense_0`` to ``Dense_2``. These are the
    names of git-re-basin, so that its table of permutations fits this model.

    Attributes:
      width: number of channels of the first convolution; later ones have up to 8 times as many.
      num_classes: number of logits.
      norm: function that makes a norm: LayerNorm over channels, or `rebasin.models.BatchNorm`.
    """

    width: int = 64
    num_classes: int = 10
    norm: NormFactory = nn.LayerNorm

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, [n, num_classes], of images [n, h, w, c]."""
        x = pad_to(images, _MIN_EXTENT)
        for step in _PLAN:
            if step == "M":
                x = max_pool(x)
            else:
                x = nn.Conv(step * self.width, (3, 3), conv_general_dilated=conv_general_dilated)(x)
                x = nn.relu(self.norm()(x))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(8 * self.width)(x))
        return nn.Dense(self.num_classes)(x)


def pad_to(images: jax.Array, extent: int) -> jax.Array:
    """Pad images [n, h, w, c] with zeros on all sides until they are at least `extent` high and wide."""
    missing = [max(extent - size, 0) for size in images.shape[1:3]]
    before_after = [(total // 2, total - total // 2) for total in missing]
    return jnp.pad(images, ((0, 0), *before_after, (0, 0)))


def max_pool(x: jax.Array) -> jax.Array:
    """Pool windows of 2×2 pixels: ``[n, h, w, c] -> [n, h // 2, w // 2, c]``.

    This is `flax.linen.max_pool`, computed by splitting height and width into axes of windows and taking a
    maximum over them. XLA's gradient of a pool on the CPU writes out, sorts and scatters the index of every
    maximum, which takes a tenth of a training step.

    The gradients differ where pixels of a window are equal: here they share the gradient, whereas XLA gives
    it to the first of them. Behind a ReLU, equal maxima are almost always zeros, whose gradient the ReLU
    drops.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(x.reshape(n, height // 2, 2, width // 2, 2, channels), axis=(2, 4))
