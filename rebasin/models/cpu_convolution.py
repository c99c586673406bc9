"""The arithmetic of convolutions on the CPU: channels last, without groups or dilation.

XLA's CPU backend computes convolutions fast if they are in one form: channels last, with a window that is
not reversed. It computes all others in a scalar loop on one thread, which is 10 to 200 times slower. Two
passes of its compiler decide which convolutions end up there:

- ``ConvCanonicalization`` transposes operands into the fast form, but only in the entry computation of a
  program. Both gradients of a convolution need this pass, and in the body of a `lax.scan` they do not get it
  (jax issue 12868). Here the gradients are written in the fast form from the start.
- ``ConvOperandSwapper`` exchanges image and kernel where the image has fewer pixels than the kernel, such as
  the 2×2 images at the end of VGG-16. The exchange reverses the window, so that the fast form is lost. Here
  such convolutions are sums of matrix products, one for each offset of the kernel.

The fast form itself is slow between few channels, because they do not fill a vector register: between 8 and 8
channels it reaches 40 % of the speed that it reaches between 16 and 16. Here neighbouring pixels of a row are
then treated as one pixel with more channels, called a block.

In this file, h and w are height and width of an image, kh and kw those of a kernel, c the number of input
channels and o that of output channels.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["CHANNELS_LAST", "Window", "convolve", "gradients", "part_of_batch", "pixels_in_block", "plain"]

# The layout of images, kernels and outputs.
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")

# Blocks of pixels are used where the product of input and output channels is at most this. With more channels
# they are slower, as the zeros that they add to the kernels cost more than full vector registers gain.
_FEW = 128

# Bytes of images that are transposed at once: about the size of a core's level-2 cache.
_CACHE = 2**20

# The fewest examples that are transposed at once. Smaller parts are not worth a round of the loop over them.
_MIN_PART = 4


class Window(NamedTuple):
    """Strides, padding and precision of a convolution: hashable, and therefore a static argument.

    Attributes:
      strides: strides of the window, vertical and horizontal.
      padding: pairs of the numbers of zeros before and after the image, vertical and horizontal.
      precision: precision of every product.
    """

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    precision: Any

    @property
    def crops(self) -> bool:
        """Whether some padding is negative, which cuts pixels off the image."""
        return min(itertools.chain.from_iterable(self.padding)) < 0

    def output_extent(self, image: Sequence[int], kernel: Sequence[int]) -> tuple[int, ...]:
        """Return the height and width of the output, given those of the image and of the kernel."""
        sizes = zip(image, self.padding, kernel, self.strides, strict=True)
        return tuple((length + sum(zeros) - width) // stride + 1 for length, zeros, width, stride in sizes)

    def reflected(self, kernel: Sequence[int]) -> "Window":
        """Return the window of the convolution that maps output gradients to image gradients.

        Strides must be 1. The convolution has the flipped kernels, with input and output channels exchanged.

        Args:
          kernel: height and width of the kernel.
        """
        pairs = zip(kernel, self.padding, strict=True)
        return self._replace(
            padding=tuple((width - 1 - low, width - 1 - high) for width, (low, high) in pairs)
        )


def plain(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolve by XLA's own convolution."""
    return lax.conv_general_dilated(
        images,
        kernels,
        window.strides,
        window.padding,
        dimension_numbers=CHANNELS_LAST,
        precision=window.precision,
    )


def _is_swapped(image: Sequence[int], kernel: Sequence[int]) -> bool:
    """Return whether XLA would exchange image and kernel, and thereby lose the fast form."""
    return math.prod(image) < math.prod(kernel)


def convolve(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolve images [n, h, w, c] with kernels [kh, kw, c, o]."""
    if _is_swapped(images.shape[1:3], kernels.shape[:2]):
        return _sum_of_products(images, kernels, window)
    return _in_blocks(images, kernels, window)


def gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: Window
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients with respect to images and kernels.

    Each is computed by a convolution where that has a fast form, and from the sum of products otherwise.

    Args:
      images: images [n, h, w, c].
      kernels: kernels [kh, kw, c, o].
      cotangent: gradient with respect to the output, [n, h', w', o].
      window: strides, padding and precision.
    """
    image, kernel, output = images.shape[1:3], kernels.shape[:2], cotangent.shape[1:3]
    _, pullback = jax.vjp(partial(_sum_of_products, window=window), images, kernels)
    by_images, by_kernels = pullback(cotangent)
    # With strides, these convolutions would have a dilated operand, which is 2 to 16 times slower than the
    # products. With a 1×1 kernel, there is only one product.
    if window.strides != (1, 1) or math.prod(kernel) == 1:
        return by_images, by_kernels
    reflected = window.reflected(kernel)
    if not reflected.crops and not _is_swapped(output, kernel):
        by_images = _in_blocks(cotangent, jnp.flip(kernels, (0, 1)).swapaxes(2, 3), reflected)
    if not _is_swapped(image, output):
        by_kernels = _kernel_gradient_in_blocks(images, kernel, cotangent, window)
    return by_images, by_kernels


# Blocks of pixels. In memory, a row of w pixels with c channels is the same as a row of w / b blocks with
# b · c channels. Kernels are extended by zeros to a whole number of blocks, (b + kw - 1) / b rounded up. For
# b = 2 and kw = 3, this makes 4/3 as many products.


def pixels_in_block(channels: int, width: int) -> int:
    """Choose how many neighbouring pixels of a row make a block; 1 where blocks do not pay.

    Args:
      channels: number of input channels times number of output channels.
      width: width of the output in pixels, which must be a whole number of blocks.
    """
    wanted = 4 if channels <= _FEW // 4 else 2 if channels <= _FEW else 1
    return math.gcd(wanted, width)


def _image_in_blocks(images: jax.Array, block: int, kernel: int, output: int, left: int) -> jax.Array:
    """Pad the rows of images and cut them into blocks: ``[n, h, w, c] -> [n, h, w', block · c]``.

    Args:
      images: images [n, h, w, c].
      block: number of pixels in a block.
      kernel: width of the kernel in pixels.
      output: width of the output in pixels, a multiple of `block`.
      left: number of zeros before the first pixel. As many follow the last pixel as the kernel needs.
    """
    n, height, width, channels = images.shape
    blocks = output // block + _blocks_of_kernel(kernel, block) - 1
    right = blocks * block - left - width
    # Concatenation copies whole rows, whereas XLA's padding decides for each number where it comes from.
    before, after = (jnp.zeros((n, height, size, channels), images.dtype) for size in (left, right))
    padded = jnp.concatenate([before, images, after], axis=2)
    return padded.reshape(n, height, blocks, block * channels)


def _blocks_of_kernel(kernel: int, block: int) -> int:
    """Return how many blocks a kernel of this width can touch, wherever in a block it begins."""
    return -(-(block + kernel - 1) // block)


def _in_blocks(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolve in blocks of pixels where that pays, and by the plain convolution otherwise."""
    n = len(images)
    kh, kw, c, o = kernels.shape
    height, width = window.output_extent(images.shape[1:3], (kh, kw))
    block = pixels_in_block(c * o, width)
    if block == 1 or window.strides[1] != 1:
        return plain(images, kernels, window)
    blocks = _blocks_of_kernel(kw, block)
    # The output pixel p of a block is computed by a kernel that is shifted by p pixels.
    shifted = [jnp.pad(kernels, ((0, 0), (p, blocks * block - p - kw), (0, 0), (0, 0))) for p in range(block)]
    kernels = jnp.stack(shifted, axis=3).reshape(kh, blocks, block * c, block * o)
    vertical, (left, _) = window.padding
    rows = _image_in_blocks(images, block, kw, width, left)
    out = plain(rows, kernels, window._replace(padding=(vertical, (0, 0))))
    return out.reshape(n, height, width, o)


def _kernel_gradient_in_blocks(
    images: jax.Array, kernel: tuple[int, ...], cotangent: jax.Array, window: Window
) -> jax.Array:
    """Return the gradient with respect to kernels for strides of 1, in blocks of pixels where that pays."""
    n, height, width, o = cotangent.shape
    (kh, kw), c = kernel, images.shape[3]
    block = min(pixels_in_block(c * o, width), 2)
    if block == 1:
        return _kernel_gradient(images, cotangent, window)
    vertical, (left, _) = window.padding
    gradient = _kernel_gradient(
        _image_in_blocks(images, block, kw, width, left),
        cotangent.reshape(n, height, width // block, block * o),
        window._replace(padding=(vertical, (0, 0))),
    )
    gradient = gradient.reshape(kh, -1, c, block, o)
    # The transpose of what `_in_blocks` does to kernels: undo each shift, and add up.
    return jnp.sum(jnp.stack([gradient[:, p : p + kw, :, p] for p in range(block)]), axis=0)


def _kernel_gradient(images: jax.Array, cotangent: jax.Array, window: Window) -> jax.Array:
    """Return the gradient with respect to kernels for strides of 1.

    It is ``out[di, dj] = Σ_{n, i, j} images[n, di + i, dj + j] cotangent[n, i, j]``. This is a convolution in
    which the cotangent is the kernel, the examples are the input channels, and each channel of the images is
    an example.
    """
    # The batch is processed in parts, in a loop, for two reasons. First, an array that enters a loop is
    # stored in memory. Without the loop, XLA fuses the transpositions with everything that the images were
    # computed from, several residual blocks back, and computes it again in an order that suits no cache. That
    # takes a quarter of a training step of ResNet-20, and `optimization_barrier` does not prevent it. Second,
    # a transposition reads each cache line once for every channel in it, so a part should fit in the cache.
    n = len(images)
    size = part_of_batch(n, images[0].size * images.dtype.itemsize)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        # Slicing before the loop would write an array of parts in addition to the array itself.
        x, g = (lax.dynamic_slice_in_dim(array, i * size, size) for array in (images, cotangent))
        return total + plain(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), window)

    extent = window.output_extent(images.shape[1:3], cotangent.shape[1:3])
    start = jnp.zeros((images.shape[3], *extent, cotangent.shape[3]), images.dtype)
    total = lax.fori_loop(0, n // size, add, start)
    return total.transpose(1, 2, 0, 3)


def part_of_batch(n: int, num_bytes: int) -> int:
    """Choose how many examples to transpose at once.

    They should fit in the cache. They should also be fewer than all examples, because XLA unrolls a loop of a
    single round, and the reasons for the loop are lost.

    Args:
      n: number of examples of the batch.
      num_bytes: size of an example in bytes.

    Returns:
      A divisor of `n`. It is `n` itself where all suitable divisors are too small to be worth a round.
    """
    most = min(n // 2, max(_CACHE // num_bytes, _MIN_PART))
    return next((size for size in range(most, _MIN_PART - 1, -1) if n % size == 0), n)


def _sum_of_products(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolve by adding up one matrix product for each offset of the kernel.

    With stride s, ``out[n, i, j] = Σ_{di, dj} images[n, s i + di, s j + dj] kernels[di, dj]``.
    """
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
