"""A small vision transformer (arXiv 2010.11929) that averages over patches in place of a class token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["ViT"]


class ViT(nn.Module):
    """A transformer whose tokens are the patches of an image.

    Patches are embedded by a convolution, and learned positions are added. Each block adds an attention layer
    and an MLP to the residual stream. A norm, a mean over patches and a dense layer follow.

    Attributes:
      width: number of units of the residual stream. Hidden layers of the MLPs have twice as many, and each
        head has ``width / num_heads``.
      num_classes: number of logits.
      depth: number of blocks.
      num_heads: number of heads of each attention layer; must divide `width`.
      patch: height and width of a patch in pixels; must divide those of the image.
    """

    width: int = 64
    num_classes: int = 10
    depth: int = 2
    num_heads: int = 8
    patch: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, [n, num_classes], of images [n, h, w, c]."""
        size = (self.patch, self.patch)
        x = nn.Conv(self.width, size, strides=size, padding="VALID", name="embed")(images)
        x = x.reshape(len(x), -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        for i in range(self.depth):
            y = nn.LayerNorm(name=f"norm_{i}_attention")(x)
            x = x + nn.MultiHeadDotProductAttention(self.num_heads, name=f"attention_{i}")(y, y)
            y = nn.LayerNorm(name=f"norm_{i}_mlp")(x)
            y = nn.gelu(nn.Dense(2 * self.width, name=f"up_{i}")(y))
            x = x + nn.Dense(self.width, name=f"down_{i}")(y)
        x = jnp.mean(nn.LayerNorm(name="norm")(x), axis=1)
        return nn.Dense(self.num_classes, name="head")(x)
