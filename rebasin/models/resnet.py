"""ResNet-20, by default with LayerNorm as git-re-basin has it (arXiv 2209.04836)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from rebasin.models.convolution import conv_general_dilated
from rebasin.models.norms import NormFactory

__all__ = ["ResNet20"]

# Three groups of three blocks of two convolutions make 18 layers. The first convolution and the dense layer
# are the other two.
_GROUPS = 3
_BLOCKS = 3


def _convolution(channels: int, extent: int, stride: int = 1) -> nn.Conv:
    """Make a square convolution. It has no bias, because the norm behind it has one."""
    return nn.Conv(
        channels,
        (extent, extent),
        strides=(stride, stride),
        use_bias=False,
        conv_general_dilated=conv_general_dilated,
    )


class _Block(nn.Module):
    """A residual block of two convolutions.

    The shortcut of a strided block is a 1×1 convolution and a norm; that of other blocks is the identity.

    Attributes:
      channels: number of output channels.
      stride: stride of the first convolution and of the shortcut.
      norm: function that makes a norm.
    """

    channels: int
    stride: int
    norm: NormFactory

    def setup(self) -> None:
        self.conv1 = _convolution(self.channels, 3, self.stride)
        self.norm1 = self.norm()
        self.conv2 = _convolution(self.channels, 3)
        self.norm2 = self.norm()
        if self.stride != 1:
            self.shortcut = nn.Sequential([_convolution(self.channels, 1, self.stride), self.norm()])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return nn.relu(y + (x if self.stride == 1 else self.shortcut(x)))


class _BlockGroup(nn.Module):
    """A sequence of residual blocks of equal width, of which the first may be strided.

    Attributes:
      channels: number of output channels.
      stride: stride of the first block.
      norm: function that makes a norm.
    """

    channels: int
    stride: int
    norm: NormFactory

    def setup(self) -> None:
        self.blocks = [
            _Block(self.channels, self.stride if index == 0 else 1, self.norm) for index in range(_BLOCKS)
        ]

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


class ResNet20(nn.Module):
    """A convolution, three groups of three residual blocks, a mean over positions and a dense layer.

    Leaves are named as in git-re-basin. For example, ``blockgroups_1/blocks_0/shortcut/layers_0/kernel`` is
    the convolution of a shortcut.

    Attributes:
      width: number of channels of the first group, 16 in the original; the others have 2 and 4 times as many.
      num_classes: number of logits.
      norm: function that makes a norm: LayerNorm over channels, or `rebasin.models.BatchNorm` as in the
        original.
    """

    width: int = 64
    num_classes: int = 10
    norm: NormFactory = nn.LayerNorm

    def setup(self) -> None:
        """Make the layers. The names of the attributes become the names of the leaves."""
        self.conv1 = _convolution(self.width, 3)
        self.norm1 = self.norm()
        self.blockgroups = [
            _BlockGroup(self.width * 2**g, 1 if g == 0 else 2, self.norm) for g in range(_GROUPS)
        ]
        self.dense = nn.Dense(self.num_classes)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Return the logits, [n, num_classes], of images [n, h, w, c]."""
        x = nn.relu(self.norm1(self.conv1(images)))
        for group in self.blockgroups:
            x = group(x)
        return self.dense(jnp.mean(x, axis=(1, 2)))
