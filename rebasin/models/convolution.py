"""A drop-in `lax.conv_general_dilated` that trains inside `lax.scan` at full speed on the CPU.

What it does on the CPU, and why, is in `rebasin.models.cpu_convolution`; here it is decided when.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rebasin.models import cpu_convolution
from rebasin.models.cpu_convolution import CHANNELS_LAST, Window, plain

__all__ = ["conv_general_dilated"]


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
        numbers == lax.conv_dimension_numbers(images.shape, kernels.shape, CHANNELS_LAST)
        and images.shape[3] == kernels.shape[2]
        and images.dtype == kernels.dtype
        # Half precision would round after each offset's product, where XLA's own loop need not.
        and images.dtype in (jnp.float32, jnp.float64)
    )


def _window(
    images: jax.Array, kernels: jax.Array, strides: Sequence[int], padding: Any, precision: Any
) -> Window | None:
    """The window with its padding in numbers; `None` where it crops, yields nothing or is not valid."""
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


# The derivative lies outside the choice of platform: that of the choice would keep every branch's residuals.
@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """The convolution, with gradients of its own."""
    return _by_platform(cpu_convolution.convolve, plain, images, kernels, window=window)


def _forward(
    images: jax.Array, kernels: jax.Array, window: Window
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    # Not `_convolve` itself, which would make forward mode over this derivative impossible too.
    return _by_platform(cpu_convolution.convolve, plain, images, kernels, window=window), (images, kernels)


def _backward(
    window: Window, residuals: tuple[jax.Array, ...], cotangent: jax.Array
) -> tuple[jax.Array, ...]:
    return _by_platform(cpu_convolution.gradients, _plain_gradients, *residuals, cotangent, window=window)


_convolve.defvjp(_forward, _backward)


def _by_platform(cpu: Callable, default: Callable, *operands: jax.Array, window: Window) -> Any:
    """The one place where platforms part; settled when the trace is lowered."""
    return lax.platform_dependent(
        *operands, cpu=partial(cpu, window=window), default=partial(default, window=window)
    )


def _plain_gradients(
    images: jax.Array, kernels: jax.Array, cotangent: jax.Array, window: Window
) -> tuple[jax.Array, ...]:
    """JAX's gradients of XLA's convolution."""
    _, pullback = jax.vjp(partial(plain, window=window), images, kernels)
    return pullback(cotangent)
