"""The arithmetic of convolutions on the CPU: channels last, without groups or dilation.

XLA's CPU backend has a fast form of convolution: channels last, window not reversed. Any other form is a
scalar loop on one thread, 10 to 200 times slower. Two of its passes decide which convolutions end there:

- ``ConvCanonicalization`` transposes operands into the fast form, but visits the entry computation only. Both
  gradients of a convolution need it, and in the body of a `lax.scan` they never get it (jax issue 12868).
  Here the gradients are written in the fast form to begin with.
- ``ConvOperandSwapper`` exchanges image and kernel where the image has fewer pixels, as the 2×2 images at the
  end of VGG-16 have, and reverses the window in doing so. Here such convolutions are sums of matrix products,
  one for each offset of the kernel.

And the fast form is slow between few channels, which fill no vector register: from 8 to 8 it reaches 40 % of
what it reaches from 16 to 16. Here neighbouring pixels of a row are then taken as the channels of one.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["CHANNELS_LAST", "Window", "convolve", "gradients", "plain"]

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")

# Products of input and output channels up to which blocks of pixels are faster.
_FEW = 128

# Bytes of images that are transposed at once, about a core's second cache; and the fewest examples.
_CACHE = 2**20
_MIN_PART = 4


class Window(NamedTuple):
    """What a convolution needs to know beside its operands; hashable, hence static.

    Attributes:
      strides: steps of the window, down and across.
      padding: zeros before and after, down and across.
      precision: of every product.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any

    @property
    def crops(self) -> bool:
        """Whether padding is negative somewhere."""
        return min(itertools.chain.from_iterable(self.padding)) < 0

    def output_extent(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Height and width of the output for those of image and kernel."""
        sizes = zip(image, self.padding, kernel, self.strides, strict=True)
        return tuple((length + sum(zeros) - width) // stride + 1 for length, zeros, width, stride in sizes)

    def reflected(self, kernel: Sequence[int]) -> "Window":
        """The window through which the output sees the image, for strides of 1."""
        pairs = zip(kernel, self.padding, strict=True)
        return self._replace(
            padding=tuple((width - 1 - low, width - 1 - high) for width, (low, high) in pairs)
        )


def plain(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        images,
        kernels,
        window.strides,
        window.padding,
        dimension_numbers=CHANNELS_LAST,
        precision=window.precision,
    )


def _is_swapped(image: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether XLA would exchange image and kernel, and so leave the fast form."""
    return math.prod(image) < math.prod(kernel)


def convolve(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """The convolved images."""
    if _is_swapped(images.shape[1:3], kernels.shape[:2]):
        return _sum_of_products(images, kernels, window)
    return _in_blocks(images, kernels, window)


def gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: Window
) -> tuple[jax.Array, jax.Array]:
    """Gradients with respect to images and kernels, each by a convolution where that has a fast form."""
    image, kernel, output = images.shape[1:3], kernels.shape[:2], cotangent.shape[1:3]
    _, pullback = jax.vjp(partial(_sum_of_products, window=window), images, kernels)
    by_images, by_kernels = pullback(cotangent)
    # Under strides the convolution would dilate an operand, 2 to 16 times slower than the products; and for
    # a 1×1 kernel there is only one product.
    if window.strides != (1, 1) or math.prod(kernel) == 1:
        return by_images, by_kernels
    reflected = window.reflected(kernel)
    if not reflected.crops and not _is_swapped(output, kernel):
        by_images = _in_blocks(cotangent, jnp.flip(kernels, (0, 1)).swapaxes(2, 3), reflected)
    if not _is_swapped(image, output):
        by_kernels = _kernel_gradient_in_blocks(images, kernel, cotangent, window)
    return by_images, by_kernels


# Blocks of pixels. A row of w pixels of c channels is, as it lies in memory, a row of w / b pixels of b · c
# channels. Kernels grow by zeros to (b + kw - 1) / b blocks, rounded up: 4/3 as many products for b = 2 and
# kw = 3.


def _pixels_in_block(channels: int, width: int) -> int:
    """Pixels of a row to take as one, for an output that is `width` pixels wide; 1 where that does not pay.

    Args:
      channels: those of the images times those of the output.
      width: of the output, in pixels.
    """
    wanted = 4 if channels <= _FEW // 4 else 2 if channels <= _FEW else 1
    return math.gcd(wanted, width)


def _image_in_blocks(images: jax.Array, block: int, kernel: int, output: int, left: int) -> jax.Array:
    """Rows of images in blocks: ``[n, h, w, c] -> [n, h, w', block · c]``, padded as the window wants it.

    Args:
      images: [n, h, w, c].
      block: pixels in a block.
      kernel: width of the kernel in pixels.
      output: width of the output in pixels, a multiple of `block`.
      left: zeros before the first pixel.
    """
    n, height, width, channels = images.shape
    blocks = output // block + _blocks_of_kernel(kernel, block) - 1
    right = blocks * block - left - width
    # By concatenation, which copies whole rows; XLA's padding asks for each number where it comes from.
    before, after = (jnp.zeros((n, height, size, channels), images.dtype) for size in (left, right))
    padded = jnp.concatenate([before, images, after], axis=2)
    return padded.reshape(n, height, blocks, block * channels)


def _blocks_of_kernel(kernel: int, block: int) -> int:
    """Blocks that a kernel of so many pixels can meet, at any offset within its first."""
    return -(-(block + kernel - 1) // block)


def _in_blocks(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """The convolution, in blocks of pixels where that pays."""
    n = len(images)
    kh, kw, c, o = kernels.shape
    height, width = window.output_extent(images.shape[1:3], (kh, kw))
    block = _pixels_in_block(c * o, width)
    if block == 1 or window.strides[1] != 1:
        return plain(images, kernels, window)
    blocks = _blocks_of_kernel(kw, block)
    # At pixel p of its block the kernel starts p pixels further to the right.
    shifted = [jnp.pad(kernels, ((0, 0), (p, blocks * block - p - kw), (0, 0), (0, 0))) for p in range(block)]
    kernels = jnp.stack(shifted, axis=3).reshape(kh, blocks, block * c, block * o)
    vertical, (left, _) = window.padding
    rows = _image_in_blocks(images, block, kw, width, left)
    out = plain(rows, kernels, window._replace(padding=(vertical, (0, 0))))
    return out.reshape(n, height, width, o)


def _kernel_gradient_in_blocks(
    images: jax.Array, kernel: tuple[int, ...], cotangent: jax.Array, window: Window
) -> jax.Array:
    """The gradient with respect to kernels for strides of 1, in blocks of pixels where that pays."""
    n, height, width, o = cotangent.shape
    (kh, kw), c = kernel, images.shape[3]
    block = min(_pixels_in_block(c * o, width), 2)
    if block == 1:
        return _kernel_gradient(images, cotangent, window)
    vertical, (left, _) = window.padding
    gradient = _kernel_gradient(
        _image_in_blocks(images, block, kw, width, left),
        cotangent.reshape(n, height, width // block, block * o),
        window._replace(padding=(vertical, (0, 0))),
    )
    gradient = gradient.reshape(kh, -1, c, block, o)
    # What `_in_blocks` does to kernels, transposed.
    return jnp.sum(jnp.stack([gradient[:, p : p + kw, :, p] for p in range(block)]), axis=0)


def _kernel_gradient(images: jax.Array, cotangent: jax.Array, window: Window) -> jax.Array:
    """``out[di, dj] = Σ_{n, i, j} images[n, di + i, dj + j] cotangent[n, i, j]``, for strides of 1.

    As a convolution: the cotangent is the kernel, the examples are its input channels, and each channel of
    the images is an example.
    """
    # A loop over parts of the batch, for two reasons. What enters a loop is an array in memory: XLA would
    # otherwise fuse the transpositions with all that the images were computed from, several residual blocks
    # back, and compute it again in an order that suits no cache, a quarter of a training step of ResNet-20
    # (it does not heed `optimization_barrier` here). And a transposition reads each cache line once for every
    # channel in it, so a part should stay in the cache.
    n = len(images)
    size = _part_of_batch(n, images[0].size * images.dtype.itemsize)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        # Sliced here and not before, where an array of parts would be written besides the array itself.
        x, g = (lax.dynamic_slice_in_dim(array, i * size, size) for array in (images, cotangent))
        return total + plain(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), window)

    extent = window.output_extent(images.shape[1:3], cotangent.shape[1:3])
    start = jnp.zeros((images.shape[3], *extent, cotangent.shape[3]), images.dtype)
    total = lax.fori_loop(0, n // size, add, start)
    return total.transpose(1, 2, 0, 3)


def _part_of_batch(n: int, num_bytes: int) -> int:
    """Examples to transpose at once: within the cache, but not all, as XLA unrolls a loop of one round.

    Args:
      n: examples of the batch.
      num_bytes: of an example.

    Returns:
      A divisor of `n`; `n` itself where all others are too small to be worth a round.
    """
    most = min(n // 2, max(_CACHE // num_bytes, _MIN_PART))
    return next((size for size in range(most, _MIN_PART - 1, -1) if n % size == 0), n)


def _sum_of_products(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """``out[n, i, j] = Σ_{di, dj} images[n, s i + di, s j + dj] kernels[di, dj]``, s being the stride."""
    n, _, _, c = images.shape
    kh, kw, _, o = kernels.shape
    height, width = window.output_extent(images.shape[1:3], (kh, kw))
    down, across = window.strides
    padded = jnp.pad(images, ((0, 0), *window.padding, (0, 0)))
    total = jnp.zeros((n * height * width, o), images.dtype)
    for di, dj in itertools.product(range(kh), range(kw)):
        limits = (n, di + (height - 1) * down + 1, dj + (width - 1) * across + 1, c)
        seen = lax.slice(padded, (0, di, dj, 0), limits, (1, down, across, 1))
        total += jnp.matmul(seen.reshape(-1, c), kernels[di, dj], precision=window.precision)
    return total.reshape(n, height, width, o)
