"""VGG-16, by default with LayerNorm as git-re-basin has it (arXiv 2209.04836)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rebasin.models.convolution import conv_general_dilated
from rebasin.models.norms import NormFactory

__all__ = ["VGG16"]

# Channels of each convolution in units of `width`; "M" is a max pool.
_PLAN = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")

# Five pools halve an image five times, so that a smaller one would vanish.
_MIN_EXTENT = 32


class VGG16(nn.Module):
    """Thirteen convolutions, each with a norm behind it, and three dense layers.

    Images smaller than 32×32 are padded to it with zeros on all sides. Leaves are ``Conv_0`` to ``Conv_12``,
    ``LayerNorm_0`` to ``LayerNorm_12`` (``BatchNorm_0`` …) and ``Dense_0`` to ``Dense_2``, as in
    git-re-basin, whose table of permutations therefore fits.

    Attributes:
      width: channels of the first convolution; later ones have up to 8 times as many.
      num_classes: number of logits.
      norm: makes each norm: LayerNorm over channels, or `rebasin.models.BatchNorm`.
    """

    width: int = 64
    num_classes: int = 10
    norm: NormFactory = nn.LayerNorm

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [n, num_classes] of images [n, h, w, c]."""
        x = _pad_to(images, _MIN_EXTENT)
        for step in _PLAN:
            if step == "M":
                x = _max_pool(x)
            else:
                x = nn.Conv(step * self.width, (3, 3), conv_general_dilated=conv_general_dilated)(x)
                x = nn.relu(self.norm()(x))
        x = x.reshape(len(x), -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(8 * self.width)(x))
        return nn.Dense(self.num_classes)(x)


def _pad_to(images: jax.Array, extent: int) -> jax.Array:
    """Images [n, h, w, c] with zeros around them, at least `extent` high and wide."""
    missing = [max(extent - size, 0) for size in images.shape[1:3]]
    before_after = [(total // 2, total - total // 2) for total in missing]
    return jnp.pad(images, ((0, 0), *before_after, (0, 0)))


def _max_pool(x: jax.Array) -> jax.Array:
    """`flax.linen.max_pool` over windows of 2×2 pixels: ``[n, h, w, c] -> [n, h // 2, w // 2, c]``.

    As a maximum over axes of its own. XLA's gradient of a pool on the CPU writes out, sorts and scatters the
    index of every maximum, a tenth of a training step. Pixels that share a maximum share its gradient here,
    where the first would get it all; behind a ReLU they are as good as always zeros, which pass none on.
    """
    n, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return jnp.max(x.reshape(n, height // 2, 2, width // 2, 2, channels), axis=(2, 4))
