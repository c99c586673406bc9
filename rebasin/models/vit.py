"""A small vision transformer (arXiv 2010.11929) with a mean over patches in place of a class token."""

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["ViT"]


class ViT(nn.Module):
    """Patches, learned positions, blocks of attention and MLP on a residual stream, a norm and a dense layer.

    Attributes:
      width: of the residual stream; heads have an eighth of it by default, hidden layers twice as much.
      num_classes: number of logits.
      depth: number of blocks.
      num_heads: heads of each attention; they divide `width`.
      patch: height and width of a patch; an image is a whole number of them.
    """

    width: int = 64
    num_classes: int = 10
    depth: int = 2
    num_heads: int = 8
    patch: int = 2

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits [n, num_classes] of images [n, h, w, c]."""
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
