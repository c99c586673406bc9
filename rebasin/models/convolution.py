"""A drop-in `lax.conv_general_dilated` that trains inside `lax.scan` at full speed on the CPU.

XLA's CPU backend has a fast form of convolution: channels last, window not reversed. Any other form is a
scalar loop on one thread, 10 to 200 times slower. Two of its passes decide which convolutions end there:

- ``ConvCanonicalization`` transposes operands into the fast form, but visits the entry computation only. Both
  gradients of a convolution need it, and in the body of a `lax.scan` they never get it (jax issue 12868).
  Here the gradients are written in the fast form to begin with.
- ``ConvOperandSwapper`` exchanges image and kernel where the image has fewer pixels, as the 2×2 images at the
  end of VGG-16 have, and reverses the window in doing so. Here such convolutions are sums of matrix products,
  one for each offset of the kernel.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

__all__ = ["conv_general_dilated"]

_CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


class _Window(NamedTuple):
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

    def reflected(self, kernel: Sequence[int]) -> "_Window":
        """The window through which the output sees the image, for strides of 1."""
        pairs = zip(kernel, self.padding, strict=True)
        return self._replace(
            padding=tuple((width - 1 - low, width - 1 - high) for width, (low, high) in pairs)
        )


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`lax.conv_general_dilated` with equal values and gradients, and fast on the CPU.

    Convolutions of float32 or float64 images in channels-last layout, ``(NHWC, HWIO, NHWC)``, without groups
    or dilation take the fast path on the CPU; on other platforms, and in every other form, this is the plain
    convolution. The platform is chosen when a trace is lowered, so one trace serves them all.

    The fast path has its own reverse-mode derivative (`jax.custom_vjp`), which makes forward mode through it
    impossible: `jax.jvp` raises. `jax.jvp` of `jax.grad` works, and so do Hessian-vector products.

    Args:
      lhs: images, [n, h, w, c] on the fast path.
      rhs: kernels, [kh, kw, c, o] on the fast path.
      window_strides: steps of the window, one per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, ``"SAME_LOWER"`` or zeros before and after, one pair per spatial axis.
      lhs_dilation: as in `lax.conv_general_dilated`.
      rhs_dilation: as in `lax.conv_general_dilated`.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: as in `lax.conv_general_dilated`.
      batch_group_count: as in `lax.conv_general_dilated`.
      precision: of all products, those of the gradients included.
      preferred_element_type: as in `lax.conv_general_dilated`.

    Returns:
      The convolved images, [n, h', w', o] on the fast path.

    Examples:
      >>> images, kernels = jnp.ones((1, 2, 2, 3)), jnp.ones((3, 3, 3, 4))
      >>> layout = ("NHWC", "HWIO", "NHWC")
      >>> conv_general_dilated(images, kernels, (1, 1), "SAME", dimension_numbers=layout)[0, 0, 0].tolist()
      [12.0, 12.0, 12.0, 12.0]
    """
    grouped = (feature_group_count, batch_group_count) != (1, 1)
    dilated = any(step != 1 for step in (*(lhs_dilation or ()), *(rhs_dilation or ())))
    other_type = preferred_element_type is not None and lhs.dtype != preferred_element_type
    if not (grouped or dilated or other_type) and _is_channels_last(lhs, rhs, dimension_numbers):
        window = _window(lhs, rhs, window_strides, padding, precision)
        if window is not None:
            return _convolve(lhs, rhs, window)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )


def _is_channels_last(images: jax.Array, kernels: jax.Array, dimension_numbers: Any) -> bool:
    """Whether these are float images [n, h, w, c] and kernels [kh, kw, c, o] that fit, with nothing empty."""
    if images.ndim != 4 or kernels.ndim != 4 or 0 in (*images.shape, *kernels.shape):
        return False
    numbers = lax.conv_dimension_numbers(images.shape, kernels.shape, dimension_numbers)
    return (
        numbers == lax.conv_dimension_numbers(images.shape, kernels.shape, _CHANNELS_LAST)
        and images.shape[3] == kernels.shape[2]
        and images.dtype == kernels.dtype
        # Half precision would round after each offset's product, where XLA's own loop need not.
        and images.dtype in (jnp.float32, jnp.float64)
    )


def _window(
    images: jax.Array, kernels: jax.Array, strides: Sequence[int], padding: Any, precision: Any
) -> _Window | None:
    """The window with its padding in numbers; `None` where it crops, yields nothing or is not valid."""
    extent, kernel_extent = images.shape[1:3], kernels.shape[:2]
    if len(strides) != 2 or min(strides) < 1:
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(extent, kernel_extent, strides, padding)
    if len(padding) != 2:
        return None
    pairs = tuple((int(low), int(high)) for low, high in padding)
    window = _Window(tuple(strides), pairs, precision)
    is_empty = min(window.output_extent(extent, kernel_extent)) < 1
    return None if window.crops or is_empty else window


# The derivative lies outside the choice of platform: that of the choice would keep every branch's residuals.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernels: jax.Array, window: _Window) -> jax.Array:
    """The convolution, with gradients of its own."""
    return _by_platform(_cpu_forward, _plain, images, kernels, window=window)


def _forward(
    images: jax.Array, kernels: jax.Array, window: _Window
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Not `_convolve` itself, which would make forward mode over this derivative impossible too.
    return _by_platform(_cpu_forward, _plain, images, kernels, window=window), (images, kernels)


def _backward(
    window: _Window, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    return _by_platform(_cpu_gradients, _plain_gradients, *residuals, cotangent, window=window)


_convolve.defvjp(_forward, _backward)


def _by_platform(cpu: Callable, default: Callable, *operands: jax.Array, window: _Window) -> Any:
    """The one place where platforms part; settled when the trace is lowered."""
    return lax.platform_dependent(
        *operands, cpu=partial(cpu, window=window), default=partial(default, window=window)
    )


def _plain(images: jax.Array, kernels: jax.Array, window: _Window) -> jax.Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        images,
        kernels,
        window.strides,
        window.padding,
        dimension_numbers=_CHANNELS_LAST,
        precision=window.precision,
    )


def _plain_gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: _Window
) -> tuple[jax.Array, ...]:
    """JAX's gradients of XLA's convolution."""
    _, pullback = jax.vjp(partial(_plain, window=window), images, kernels)
    return pullback(cotangent)


# The CPU's own arithmetic, by convolutions in the fast form or by matrix products.


def _is_swapped(image: Sequence[int], kernel: Sequence[int]) -> bool:
    """Whether XLA would exchange image and kernel, and so leave the fast form."""
    return math.prod(image) < math.prod(kernel)


def _cpu_forward(images: jax.Array, kernels: jax.Array, window: _Window) -> jax.Array:
    if _is_swapped(images.shape[1:3], kernels.shape[:2]):
        return _sum_of_products(images, kernels, window)
    return _plain(images, kernels, window)


def _cpu_gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: _Window
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
        by_images = _plain(cotangent, jnp.flip(kernels, (0, 1)).swapaxes(2, 3), reflected)
    if not _is_swapped(image, output):
        by_kernels = _kernel_gradient(images, cotangent, window)
    return by_images, by_kernels


def _kernel_gradient(images: jax.Array, cotangent: jax.Array, window: _Window) -> jax.Array:
    """``out[di, dj] = Σ_{n, i, j} images[n, di + i, dj + j] cotangent[n, i, j]``, for strides of 1.

    As a convolution: the cotangent is the kernel, the examples are its input channels, and each channel of
    the images is an example.
    """

    def partial_sum(images: jax.Array, cotangent: jax.Array) -> jax.Array:
        return _plain(images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), window)

    # A loop over halves of the batch, because what enters a loop is an array in memory. XLA would otherwise
    # fuse the transpositions with all that the images were computed from, several residual blocks back, and
    # compute it again in an order that suits no cache: a quarter of a training step of ResNet-20. It does
    # not heed `optimization_barrier` here, and unrolls a loop of one round.
    if len(images) % 2:
        total = partial_sum(images, cotangent)
    else:
        halves = [x.reshape(2, len(x) // 2, *x.shape[1:]) for x in (images, cotangent)]
        template = jax.eval_shape(partial_sum, *(half[0] for half in halves))
        total, _ = lax.scan(
            lambda total, pair: (total + partial_sum(*pair), None), jnp.zeros_like(template), tuple(halves)
        )
    return total.transpose(1, 2, 0, 3)


def _sum_of_products(images: jax.Array, kernels: jax.Array, window: _Window) -> jax.Array:
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
