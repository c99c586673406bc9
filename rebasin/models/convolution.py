"""A drop-in `lax.conv_general_dilated` that trains inside `lax.scan` at full speed on the CPU.

This file decides which convolutions take the fast path. `rebasin.models.cpu_convolution` has the arithmetic
of the fast path, and explains why XLA's own is slow.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rebasin.models import cpu_convolution
from rebasin.models.cpu_convolution import CHANNELS_LAST, Window, plain

__all__ = ["conv_general_dilated", "fast_convolution", "plain_gradients"]


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
    """Convolve as `lax.conv_general_dilated` does, with equal values and gradients, but fast on the CPU.

    The fast path is taken on the CPU by convolutions of float32 or float64 images in channels-last layout,
    ``(NHWC, HWIO, NHWC)``, without groups or dilation. On other platforms, and in all other cases, this is
    the plain convolution. The platform is chosen when a trace is lowered, so one trace serves all platforms.

    The fast path has a reverse-mode derivative of its own (`jax.custom_vjp`). Forward mode through it is
    therefore impossible, and `jax.jvp` raises. `jax.jvp` of `jax.grad` works, and so do Hessian-vector
    products.

    Args:
      lhs: images, [n, h, w, c] on the fast path.
      rhs: kernels, [kh, kw, c, o] on the fast path.
      window_strides: strides of the window, one per spatial axis.
      padding: ``"SAME"``, ``"VALID"``, ``"SAME_LOWER"``, or one pair per spatial axis with the numbers of
        zeros before and after.
      lhs_dilation: as in `lax.conv_general_dilated`.
      rhs_dilation: as in `lax.conv_general_dilated`.
      dimension_numbers: as in `lax.conv_general_dilated`.
      feature_group_count: as in `lax.conv_general_dilated`.
      batch_group_count: as in `lax.conv_general_dilated`.
      precision: precision of all products, including those of the gradients.
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
            return fast_convolution(lhs, rhs, window)
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
    """Return whether these are nonempty float images [n, h, w, c] and kernels [kh, kw, c, o] that fit."""
    if images.ndim != 4 or kernels.ndim != 4 or 0 in (*images.shape, *kernels.shape):
        return False
    numbers = lax.conv_dimension_numbers(images.shape, kernels.shape, dimension_numbers)
    return (
        numbers == lax.conv_dimension_numbers(images.shape, kernels.shape, CHANNELS_LAST)
        and images.shape[3] == kernels.shape[2]
        and images.dtype == kernels.dtype
        # The fast path adds up one product for each offset of the kernel. In half precision it would round
        # each of them, which XLA's own loop need not do.
        and images.dtype in (jnp.float32, jnp.float64)
    )


def _window(
    images: jax.Array, kernels: jax.Array, strides: Sequence[int], padding: Any, precision: Any
) -> Window | None:
    """Return the window with its padding in numbers.

    It is `None`, which selects the plain convolution, where the padding crops the image, where the output is
    empty, and where strides or padding are not valid, so that XLA reports the error.
    """
    extent, kernel_extent = images.shape[1:3], kernels.shape[:2]
    if len(strides) != 2 or min(strides) < 1:
        return None
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(extent, kernel_extent, strides, padding)
    if len(padding) != 2:
        return None
    pairs = tuple((int(low), int(high)) for low, high in padding)
    window = Window(tuple(strides), pairs, precision)
    is_empty = min(window.output_extent(extent, kernel_extent)) < 1
    return None if window.crops or is_empty else window


# The derivative is defined outside the choice of platform. Differentiating the choice itself would keep the
# residuals of every branch in memory.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def fast_convolution(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolve in the form that is fast on each platform, with a derivative of its own.

    Args:
      images: float images [n, h, w, c].
      kernels: kernels [kh, kw, c, o].
      window: strides, padding and precision.

    Returns:
      The convolved images, [n, h', w', o].
    """
    return _by_platform(cpu_convolution.convolve, plain, images, kernels, window=window)


def _forward(
    images: jax.Array, kernels: jax.Array, window: Window
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Return the convolved images, and what the derivative needs: the operands."""
    # Calling `fast_convolution` here would make forward mode over this derivative impossible, too.
    return _by_platform(cpu_convolution.convolve, plain, images, kernels, window=window), (images, kernels)


def _backward(
    window: Window, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    """Return the gradients with respect to images and kernels."""
    return _by_platform(cpu_convolution.gradients, plain_gradients, *residuals, cotangent, window=window)


fast_convolution.defvjp(_forward, _backward)


def _by_platform(cpu: Callable, default: Callable, *operands: jax.Array, window: Window) -> Any:
    """Call `cpu` on the CPU and `default` elsewhere; the choice is made when the trace is lowered."""
    return lax.platform_dependent(
        *operands, cpu=partial(cpu, window=window), default=partial(default, window=window)
    )


def plain_gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: Window
) -> tuple[jax.Array, ...]:
    """Return JAX's own gradients of the plain convolution with respect to images and kernels."""
    _, pullback = jax.vjp(partial(plain, window=window), images, kernels)
    return pullback(cotangent)
